// Both answers with their differences marked, and the bytes held and read.

function showAnswers(data, choice) {
  const question = data.questions[choice.question], full = question.answers[0];
  const answer = question.answers[choice.setting], setting = data.settings[choice.setting];
  byId("reference").hidden = !question.references.length;
  byId("reference").replaceChildren(
    make("span", { class: "label", text: "expected" }), ` ${question.references.join(" or ")}`);
  if (choice.setting === 0) {
    byId("answers").replaceChildren(answerBox("full cache", verdictOf(full), [{ text: full.text }], ""));
  } else if (answer.refusal !== undefined) {
    byId("answers").replaceChildren(
      answerBox("full cache", verdictOf(full), [{ text: full.text }], ""),
      answerBox(setting.name, "refused", [{ text: answer.refusal }], ""));
  } else {
    const [before, after] = differences(full.text, answer.text);
    byId("answers").replaceChildren(
      answerBox("full cache", verdictOf(full), before, "lost"), answerBox(setting.name, verdictOf(answer), after, "new"));
  }
  showBars(full, answer, setting);
}

function answerBox(name, verdict, words, kind) {
  const marked = words.map(({ text, differs }) => (differs ? make("mark", { class: kind, text }) : text));
  const empty = words.every(({ text }) => text.trim() === "");
  return make("article", { "data-verdict": verdict },
    make("h3", {}, make("b", { text: VERDICTS[verdict].symbol }), ` ${name}`),
    make("p", {}, ...(empty ? [make("i", { text: "no answer" })] : marked)));
}

function showBars(full, answer, setting) {
  const bars = byId("bars"), bar = (name, count, kind) => {
    const line = make("div", { class: "bar" }, make("span", { text: name }), make("i", { class: kind }),
      make("b", { text: bytes(count) }));
    line.children[1].style.setProperty("--share", count / full.held);
    return line;
  };
  const lines = [["full cache", full.held, "full"]];
  if (answer.refusal === undefined) lines.push(["held", answer.held, "held"], ["read at a step", answer.read, "read"]);
  bars.replaceChildren(...lines.map((line) => bar(...line)));
  bars.setAttribute("aria-label", lines.map(([name, count]) => `${name}: ${bytes(count)}`).join(", "));
  byId("figures").textContent = answer.refusal !== undefined ? "" :
    `${percent(answer.retention)} of the vision entries, in ${percent(answer.visionHeld)} of their bytes` +
    (answer.computed < 1 ? `; ${percent(answer.computed)} of tokens × layers computed in prefill` : "") +
    ". Bytes as the cache stands after the prompt, text included.";
}
