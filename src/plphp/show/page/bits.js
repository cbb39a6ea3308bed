// What plphp/show/kept_bits.py packed: which tokens each head of each layer holds, and how.

const cacheOfBits = new Map();

function bytesOf(text) {
  if (!cacheOfBits.has(text)) cacheOfBits.set(text, Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)));
  return cacheOfBits.get(text);
}

function bit(bytes, index) {
  return (bytes[index >> 3] >> (index & 7)) & 1;
}

/** Brightness of a token by how it is held: 0 dropped, 1 whole, between them the rungs in the order of their bytes. */
function brightnesses(kept) {
  const rungs = kept.ways.filter((way) => way.name !== "whole");
  return kept.ways.map((way) => (way.name === "whole" ? 1 : (rungs.indexOf(way) + 1) / (rungs.length + 1)));
}

/** The rows of bits for a layer and a head; -1 stands for all of them. */
function rowsOf(kept, layer, head) {
  const rows = [];
  let first = 0;
  kept.layers.forEach((each, index) => {
    for (let own = 0; own < each.heads; own++) {
      if ((layer < 0 || layer === index) && (head < 0 || head === own)) rows.push({ layer: each.layer, row: first + own });
    }
    first += each.heads;
  });
  return rows;
}

/** For every token of a question: its mean brightness over the rows, and the share of them that hold it and never got it. */
function tokensOf(kept, tokens, layer, head) {
  const rows = rowsOf(kept, layer, head);
  const light = new Float32Array(tokens), held = new Float32Array(tokens), left = new Float32Array(tokens);
  const weight = 1 / Math.max(1, rows.length), levels = brightnesses(kept);
  const add = (bytes, start, value, target) => {
    for (let token = 0; token < tokens; token++) if (bit(bytes, start + token)) target[token] += value;
  };
  for (const { layer: number, row } of rows) {
    kept.ways.forEach((way, index) => {
      add(bytesOf(way.bits), row * tokens, weight * levels[index], light);
      add(bytesOf(way.bits), row * tokens, weight, held);
    });
    for (const stage of kept.left) if (stage.layer <= number) add(bytesOf(stage.bits), 0, weight, left);
  }
  return { light, held, left };
}

/** By way of holding tokens, the share of them in a layer and a head. */
function sharesOf(kept, tokens, layer, head) {
  const rows = rowsOf(kept, layer, head);
  return kept.ways.map((way) => {
    const bytes = bytesOf(way.bits);
    let count = 0;
    for (const { row } of rows) for (let token = 0; token < tokens; token++) count += bit(bytes, row * tokens + token);
    return count / Math.max(1, rows.length * tokens);
  });
}
