// The pictures in colour: a token that is dropped is dark, one in few bits dimmed.

const DARKEST = 0.9; // so much of a dropped patch is covered that one still sees what is gone
const STRIP = 20; // pixels of a token that has no place on the picture

const loaded = new Map();

/** The image of a data URI; draws again when the browser has decoded it. */
function imageOf(source, again) {
  if (!loaded.has(source)) {
    const image = new Image();
    image.addEventListener("load", again);
    image.src = source;
    loaded.set(source, image);
  }
  return loaded.get(source);
}

function showPictures(data, choice, again) {
  const question = data.questions[choice.question], answer = question.answers[choice.setting];
  const refused = answer.refusal !== undefined, kept = refused ? null : answer.kept;
  const name = data.settings[choice.setting].name;
  byId("pictures-title").replaceChildren(
    refused ? "The picture" : choice.original ? "Whole picture" : `Kept by ${name} `,
    make("span", { text: refused || choice.original ? "" : placeName(kept, choice.layer, choice.head) }));
  const tokens = question.images.reduce((sum, image) => sum + image.tokens, 0);
  const values = refused || choice.original ? null : tokensOf(kept, tokens, choice.layer, choice.head);
  const paired = question.pictures.length === question.images.length; // some models cut an image into several
  let first = 0;
  const drawn = question.images.map((image, index) => {
    const own = values && { light: values.light.subarray(first, first + image.tokens), left: values.left.subarray(first, first + image.tokens) };
    first += image.tokens;
    const canvas = make("canvas", { role: "img", "aria-label": pictureWords(image, index, own) });
    const source = paired ? imageOf(data.pictures[question.pictures[index]], again) : null;
    if (source && image.grid) drawOver(canvas, source, image.grid, own);
    else if (own) drawStrip(canvas, image, own);
    return make("figure", {}, ...(source && !image.grid ? [wholePicture(source)] : []), canvas);
  });
  const one = paired && drawn.length === 1 && question.images[0].grid !== null;
  const apart = !paired || one ? question.pictures.map((index) => imageOf(data.pictures[index], again)) : [];
  const figures = apart.map((source) => make("figure", { class: one ? "beside" : null }, wholePicture(source)));
  byId("pictures").dataset.count = one ? "one" : "several";
  byId("pictures").replaceChildren(...figures, ...drawn);
  byId("original").checked = choice.original;
  showScale(kept, values);
}

function wholePicture(source) {
  return make("img", { src: source.src, alt: "the picture" });
}

function pictureWords(image, index, own) {
  if (!own) return `picture ${index + 1}, whole`;
  const held = own.light.filter((value) => value > 0).length;
  return `picture ${index + 1}: ${held} of ${image.tokens} tokens are held somewhere in what is shown`;
}

function drawOver(canvas, source, [frames, height, width], own) {
  canvas.width = source.naturalWidth || 448;
  canvas.height = source.naturalHeight || 448;
  const context = canvas.getContext("2d");
  if (source.complete && source.naturalWidth) context.drawImage(source, 0, 0, canvas.width, canvas.height);
  if (!own) return;
  const places = height * width, edge = (index, count, size) => Math.round((index * size) / count);
  for (let place = 0; place < places; place++) {
    let light = 0, left = 0;
    for (let frame = 0; frame < frames; frame++) {
      light += own.light[frame * places + place] / frames;
      left += own.left[frame * places + place] / frames;
    }
    const x = place % width, y = Math.floor(place / width);
    const box = [edge(x, width, canvas.width), edge(y, height, canvas.height)];
    box.push(edge(x + 1, width, canvas.width) - box[0], edge(y + 1, height, canvas.height) - box[1]);
    cover(context, box, light, left);
  }
}

function drawStrip(canvas, image, own) {
  const across = Math.ceil(Math.sqrt(2 * image.tokens));
  canvas.width = across * STRIP;
  canvas.height = Math.ceil(image.tokens / across) * STRIP;
  const context = canvas.getContext("2d");
  for (let token = 0; token < image.tokens; token++) {
    const box = [(token % across) * STRIP, Math.floor(token / across) * STRIP, STRIP - 1, STRIP - 1];
    context.fillStyle = shade(1);
    context.fillRect(...box);
    cover(context, box, own.light[token], own.left[token]);
  }
}

/** Darken a patch by what is not held of it, and tint it by how often it had left before layers got it. */
function cover(context, box, light, left) {
  context.fillStyle = `rgba(${DARK.join(", ")}, ${DARKEST * (1 - light)})`; // not black, as pictures have that themselves
  context.fillRect(...box);
  context.strokeStyle = `rgba(255, 255, 255, ${0.28 * (1 - light)})`; // a dark picture needs more than darkness
  context.beginPath();
  context.moveTo(box[0], box[1] + box[3]);
  context.lineTo(box[0] + box[2], box[1]);
  context.stroke();
  if (left > 0) {
    context.fillStyle = `rgba(150, 60, 160, ${0.55 * left})`;
    context.fillRect(...box);
  }
}

function showScale(kept, values) {
  const keys = [];
  const key = (words, light, left) => {
    const swatch = make("canvas", { width: 28, height: 16, "aria-hidden": "true" }), context = swatch.getContext("2d");
    const colours = context.createLinearGradient(0, 0, 28, 0);
    ["#e4572e", "#ffc857", "#7dd3fc"].forEach((colour, index) => colours.addColorStop(index / 2, colour));
    context.fillStyle = colours;
    context.fillRect(0, 0, 28, 16);
    cover(context, [0, 0, 28, 16], light, left);
    keys.push(make("span", { class: "key" }, swatch, ` ${words}`));
  };
  if (values) {
    key("dropped", 0, 0);
    const levels = brightnesses(kept);
    kept.ways.forEach((way, index) => {
      const bits = way.name === "whole" ? "whole" : `${way.name}, ${percent(way.share)} of the bytes`;
      key(bits, levels[index], 0);
    });
    if (values.left.some((value) => value > 0)) key("left before the layer got it", 0, 1);
  }
  byId("scale").replaceChildren(...keys);
}
