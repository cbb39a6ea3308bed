// The keyboard: digits choose questions, arrows move in the table that has the focus, a few letters do the rest.

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

/** What a key changes of a choice; null where it does nothing. */
function changeBy(key, data, choice, inLayers) {
  if (/^[1-9]$/.test(key)) return Number(key) <= data.questions.length ? { question: Number(key) - 1 } : null;
  if (key === "Escape") return { layer: -1, head: -1 };
  if (key === "o") return { original: !choice.original };
  if (!(key in ARROWS)) return null;
  const [down, right] = ARROWS[key];
  if (!inLayers) return { setting: besideMethod(data, choice.setting, down, right) };
  const kept = data.questions[choice.question].answers[choice.setting].kept;
  if (!kept) return null;
  const layer = Math.max(-1, Math.min(kept.layers.length - 1, choice.layer + down));
  const heads = layer < 0 ? Math.max(...kept.layers.map((each) => each.heads)) : kept.layers[layer].heads;
  return { layer, head: Math.max(-1, Math.min(heads - 1, choice.head + right)) };
}

function listenToKeys(data, choice, pick) {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const inLayers = byId("layers").contains(document.activeElement);
    if (event.key === "m" || event.key === "l") {
      focusChosen(event.key === "l" ? "layers" : "methods");
      event.preventDefault();
      return;
    }
    const change = changeBy(event.key, data, choice, inLayers);
    if (!change) return;
    event.preventDefault();
    pick(change);
    if (inLayers || event.key in ARROWS) focusChosen(inLayers ? "layers" : "methods");
  });
}

function focusChosen(table) {
  byId(table).querySelector("[aria-selected=true]")?.focus();
}
