// The table of methods and retentions, coloured by their answers.

const VERDICTS = {
  right: { symbol: "✓", words: "right answer" },
  wrong: { symbol: "✗", words: "another answer than the expected one" },
  same: { symbol: "=", words: "the answer of the full cache" },
  different: { symbol: "≠", words: "another answer than the full cache's" },
  refused: { symbol: "–", words: "refused" },
};

function verdictOf(answer) {
  if (answer.refusal !== undefined) return "refused";
  if (answer.right !== null) return answer.right ? "right" : "wrong";
  return answer.same ? "same" : "different";
}

/** Rows of the table: a label with its settings, by column; a setting without a retention has the whole row. */
function methodRows(settings) {
  const retentions = [...new Set(settings.map((setting) => setting.retention).filter((value) => value !== null))];
  retentions.sort((a, b) => b - a);
  const rows = [];
  settings.forEach((setting, index) => {
    let row = rows.find((each) => each.label === setting.label && setting.retention !== null);
    if (!row) rows.push((row = { label: setting.label, whole: setting.retention === null, cells: [] }));
    row.cells[row.whole ? 0 : retentions.indexOf(setting.retention)] = index;
  });
  return { retentions, rows };
}

function buildMethods(data, pick) {
  const { retentions, rows } = methodRows(data.settings), table = byId("methods");
  table.style.setProperty("--columns", Math.max(1, retentions.length));
  const cell = (index, whole) =>
    index === undefined
      ? make("span", { class: "empty" })
      : make("button", { role: "gridcell", class: whole ? "method whole" : "method", "data-setting": index,
          onclick: () => pick({ setting: index }) });
  const line = (...children) => make("div", { role: "row" }, ...children);
  const headings = retentions.map((value) => make("span", { role: "columnheader", text: percent(value) }));
  const columns = Array.from({ length: Math.max(1, retentions.length) }, (_, column) => column);
  table.replaceChildren(
    ...(retentions.length ? [line(make("span", {}), ...headings)] : []),
    ...rows.map((row) =>
      line(make("span", { role: "rowheader", text: row.label, title: row.label }),
        ...(row.whole ? [cell(row.cells[0], true)] : columns.map((column) => cell(row.cells[column], false))))),
  );
}

function showMethods(data, choice) {
  const answers = data.questions[choice.question].answers, cells = [...byId("methods").querySelectorAll("button")];
  const seen = new Set();
  for (const cell of cells) {
    const index = Number(cell.dataset.setting), answer = answers[index], verdict = verdictOf(answer);
    const held = verdict === "refused" ? "" : percent(answer.held / answer.full);
    seen.add(verdict);
    cell.dataset.verdict = verdict;
    cell.replaceChildren(make("b", { text: VERDICTS[verdict].symbol }), ` ${held}`);
    const words = held ? `${VERDICTS[verdict].words}, ${held} of the bytes held` : `refused: ${answer.refusal}`;
    cell.setAttribute("aria-label", `${data.settings[index].name}: ${words}`);
    cell.title = words;
  }
  choose(cells, (cell) => Number(cell.dataset.setting) === choice.setting);
  byId("verdicts").replaceChildren(
    ...Object.keys(VERDICTS).filter((name) => seen.has(name)).map((name) =>
      make("span", { class: "key" }, make("b", { "data-verdict": name, text: VERDICTS[name].symbol }), ` ${VERDICTS[name].words}`)),
    make("span", { class: "key", text: "% of the full cache's bytes" }),
  );
}

/** The setting that stands beside another; itself at the edge. */
function besideMethod(data, setting, down, right) {
  const { rows } = methodRows(data.settings);
  const place = rows.findIndex((row) => row.cells.includes(setting)), column = rows[place].cells.indexOf(setting);
  if (right) {
    const cells = Object.keys(rows[place].cells).map(Number), at = cells.indexOf(column);
    return rows[place].cells[cells[Math.max(0, Math.min(cells.length - 1, at + right))]];
  }
  const row = rows[Math.max(0, Math.min(rows.length - 1, place + down))];
  return row.cells[column] ?? row.cells.find((index) => index !== undefined);
}
