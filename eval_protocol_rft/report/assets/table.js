// The table of prompt groups: one line each, sorted, filtered, and opened by a click.

const LINES = 200; // Drawn at once; more on request.

const rewardsOf = (group, index) => group.columns[index.column];

/** Columns: title, what a line shows, what it is sorted by. */
const COLUMNS = [
  { title: "#", value: (g) => g.data_idx },
  { title: "Prompt", value: (g) => g.prompt, text: true },
  { title: "Completions", value: (g) => g.size },
  { title: "Scored", value: (g, index) => rewardsOf(g, index).scored },
  { title: "Failed", value: (g) => g.failed },
  { title: "Truncated", value: (g) => g.truncated },
  { title: "Mean reward", value: (g, index) => rewardsOf(g, index).mean, digits: 3 },
  { title: "Pass rate", value: passRate, digits: 2 },
  { title: "Mean length", value: (g) => g.mean_length, digits: 1 },
];

function passRate(group, index) {
  const { scored, passed } = rewardsOf(group, index);
  return scored ? passed / scored : null;
}

const FILTERS = {
  all: () => true,
  passed: (g, index) => passRate(g, index) === 1,
  none: (g, index) => passRate(g, index) === 0,
  mixed: (g, index) => passRate(g, index) > 0 && passRate(g, index) < 1,
  truncated: (g) => g.truncated > 0,
  failed: (g) => g.failed > 0,
  unscored: (g, index) => rewardsOf(g, index).scored < g.size - g.failed,
};

/** Positions of the groups to show, in order. */
function selected(index, { sort, down, filter, find }) {
  const wanted = find.trim().toLowerCase();
  const keep = FILTERS[filter];
  const { value } = COLUMNS[sort];
  const places = [...index.groups.keys()].filter((i) => {
    const group = index.groups[i];
    const found = group.prompt.toLowerCase().includes(wanted) || group.row_id.toLowerCase().includes(wanted);
    return found && keep(group, index);
  });
  const key = new Map(places.map((i) => [i, value(index.groups[i], index)]));
  const sign = down ? -1 : 1;
  // Groups without a value come last either way.
  return places.sort((i, j) => {
    const [a, b] = [key.get(i), key.get(j)];
    if (a === null || b === null) return (a === null) - (b === null) || i - j;
    const order = typeof a === "string" ? a.localeCompare(b) : a - b;
    return sign * order || i - j;
  });
}

function groupsTable(table, index, state, onChange) {
  const opened = new Map(); // Position -> the element with its contents.
  const heads = COLUMNS.map(({ title, text }, i) => {
    const button = make("button", { type: "button" }, title);
    button.addEventListener("click", () => {
      // Text starts at A, numbers at the lowest: the hardest prompts come first.
      state.down = state.sort === i && !state.down;
      state.sort = i;
      onChange();
    });
    return make("th", { scope: "col", class: text ? "left" : null }, button);
  });
  const body = make("tbody");
  table.append(make("thead", null, make("tr", null, heads)), body);

  function line(position) {
    const group = index.groups[position];
    const isOpen = opened.has(position);
    const cells = COLUMNS.map(({ value, digits, text }) => {
      const content = value(group, index);
      if (!text) return make("td", null, number(content, digits));
      const button = make("button", { type: "button", class: "open", "aria-expanded": String(isOpen) },
        content ? shown(content) : "(empty prompt)");
      return make("td", { class: "left" }, button, make("span", { class: "row-id" }, shown(group.row_id)));
    });
    const row = make("tr", { class: "line", "data-group": position }, cells);
    row.addEventListener("click", () => toggle(position, row));
    return isOpen ? [row, opened.get(position)] : [row];
  }

  async function toggle(position, row) {
    if (getSelection()?.toString() && !row.contains(document.activeElement)) return;
    const button = row.querySelector(".open");
    if (opened.has(position)) {
      opened.get(position).remove();
      opened.delete(position);
      button.setAttribute("aria-expanded", "false");
      return;
    }
    const cell = make("td", { colspan: COLUMNS.length });
    const detail = make("tr", { class: "detail" }, cell);
    opened.set(position, detail);
    row.after(detail);
    button.setAttribute("aria-expanded", "true");
    cell.append(await groupContents(position, index));
  }

  function draw(places, from = 0) {
    if (from === 0) {
      body.replaceChildren();
      heads.forEach((head, i) => {
        head.ariaSort = i !== state.sort ? "none" : state.down ? "descending" : "ascending";
      });
    }
    body.append(...places.slice(from, from + LINES).flatMap(line));
    return Math.min(places.length, from + LINES);
  }

  /** Open groups again from what they hold: the chosen reward column has changed. */
  async function refresh() {
    for (const [position, detail] of opened) {
      detail.firstChild.replaceChildren(await groupContents(position, index));
    }
  }
  return { draw, refresh };
}
