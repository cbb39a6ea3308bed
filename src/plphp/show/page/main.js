// What is chosen, and showing it.

const data = JSON.parse(byId("data").textContent);
const choice = { question: 0, setting: Math.min(1, data.settings.length - 1), layer: -1, head: -1, original: false };
let shape = "";

function pick(change) {
  Object.assign(choice, change);
  show();
}

function show() {
  const question = data.questions[choice.question], kept = question.answers[choice.setting].kept;
  for (const button of byId("questions").children) {
    button.setAttribute("aria-pressed", Number(button.dataset.question) === choice.question);
  }
  showMethods(data, choice);
  if (kept) showLayerTable(question, kept);
  byId("layers-card").hidden = !kept;
  showAnswers(data, choice);
  drawPictures();
}

function drawPictures() {
  showPictures(data, choice, drawPictures);
}

/** Build the table again where layers or heads are others; what is chosen in it stays where it can. */
function showLayerTable(question, kept) {
  const own = JSON.stringify(kept.layers);
  if (own !== shape) buildLayers(kept, pick);
  shape = own;
  choice.layer = Math.min(choice.layer, kept.layers.length - 1);
  showLayers(kept, question.images.reduce((sum, image) => sum + image.tokens, 0), choice);
}

function start() {
  const { model, dtype, hardware, plphp, date } = data.origin;
  byId("origin").textContent = `${model} · ${dtype} · ${hardware} · plphp ${plphp} · ${date}`;
  byId("questions").replaceChildren(
    ...data.questions.map((question, index) =>
      make("button", { "data-question": index, onclick: () => pick({ question: index }) },
        make("kbd", { text: index < 9 ? index + 1 : "" }), make("span", { text: question.text }))));
  byId("original").addEventListener("change", (event) => pick({ original: event.target.checked }));
  buildMethods(data, pick);
  listenToKeys(data, choice, pick);
  show();
}

start();
