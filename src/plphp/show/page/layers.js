// The table of layers and KV heads: how much each holds.

const DARK = [38, 45, 64], BRIGHT = [125, 211, 252]; // dropped and held, as on the pictures: dark is gone

function shade(share) {
  const colour = DARK.map((from, channel) => Math.round(from + share * (BRIGHT[channel] - from)));
  return `rgb(${colour.join(", ")})`;
}

/** Black or white, whichever is read better on a shade: the one whose contrast is higher. */
function inkOn(share) {
  const linear = DARK.map((from, channel) => {
    const value = (from + share * (BRIGHT[channel] - from)) / 255;
    return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.179 ? "#000" : "#fff";
}

function buildLayers(kept, pick) {
  const heads = Math.max(0, ...kept.layers.map((layer) => layer.heads)), table = byId("layers");
  const button = (layer, head, text, kind) =>
    make("button", { role: "gridcell", class: kind, "data-layer": layer, "data-head": head, text,
      onclick: () => pick({ layer, head }) });
  const line = (...children) => make("div", { role: "row" }, ...children);
  const columns = Array.from({ length: heads }, (_, head) => head);
  table.style.setProperty("--heads", heads);
  table.classList.toggle("dense", heads > 8);
  table.replaceChildren(
    line(button(-1, -1, "all", "name"), ...columns.map((head) => button(-1, head, `h${head}`, "name")), make("span", {})),
    ...kept.layers.map((layer, index) =>
      line(button(index, -1, String(layer.layer), "name"),
        ...columns.map((head) => (head < layer.heads ? button(index, head, "", "cell") : make("span", {}))),
        attention(layer))),
  );
}

function attention(layer) {
  const known = !["no-vision", "non-finite"].includes(layer.class);
  const bar = make("i", {}), score = make("span", { class: "attention", role: "rowheader",
    title: `layer ${layer.layer}: ${layer.class}, vision attention ${layer.score.toFixed(3)}, rate ${layer.rate.toFixed(2)}` },
    bar, make("span", { text: known ? layer.score.toFixed(2) : "" }));
  bar.style.setProperty("--share", layer.score);
  return score;
}

function showLayers(kept, tokens, choice) {
  const levels = brightnesses(kept), cells = [...byId("layers").querySelectorAll("button")];
  const dense = byId("layers").classList.contains("dense");
  for (const cell of cells) {
    const layer = Number(cell.dataset.layer), head = Number(cell.dataset.head);
    const shares = sharesOf(kept, tokens, layer, head), held = shares.reduce((sum, share) => sum + share, 0);
    const ways = kept.ways.map((way, index) => `${percent(shares[index])} ${way.name}`).join(", ");
    const words = `${placeName(kept, layer, head)}: ${percent(held)} of the vision tokens held${ways && ` (${ways})`}`;
    cell.setAttribute("aria-label", words);
    cell.title = words;
    if (!cell.classList.contains("cell")) continue;
    const light = shares.reduce((sum, share, index) => sum + share * levels[index], 0);
    cell.style.background = shade(light);
    cell.style.color = inkOn(light);
    cell.textContent = dense ? "" : Math.round(100 * held);
  }
  choose(cells, (cell) => Number(cell.dataset.layer) === choice.layer && Number(cell.dataset.head) === choice.head);
  for (const cell of cells) {
    const inLayer = choice.layer < 0 || Number(cell.dataset.layer) === choice.layer;
    const inHead = choice.head < 0 || Number(cell.dataset.head) === choice.head;
    cell.classList.toggle("shown", inLayer && inHead && (choice.layer >= 0 || choice.head >= 0));
  }
}

function placeName(kept, layer, head) {
  const layers = layer < 0 ? "all layers" : `layer ${kept.layers[layer].layer}`;
  return head < 0 ? `${layers}, all KV heads` : `${layers}, KV head ${head}`;
}
