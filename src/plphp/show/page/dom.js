// Elements, numbers in words, and tables in which the arrow keys move.

const byId = (id) => document.getElementById(id);

/** An element with attributes, properties ("text", "on...") and children; text stays text, whatever is in it. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const percent = (share) => `${Math.round(100 * share)} %`;

function bytes(count) {
  for (const unit of ["B", "KiB", "MiB"]) {
    if (count < 1024) return unit === "B" ? `${count} B` : `${count.toFixed(1)} ${unit}`;
    count /= 1024;
  }
  return `${count.toFixed(1)} GiB`;
}

/** Mark the cell that is chosen in a table of buttons; it alone is reached by Tab, the others by the arrow keys. */
function choose(cells, isChosen) {
  for (const cell of cells) {
    const chosen = isChosen(cell);
    cell.setAttribute("aria-selected", chosen);
    cell.tabIndex = chosen ? 0 : -1;
  }
}
