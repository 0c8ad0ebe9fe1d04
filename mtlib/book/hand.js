// A figure of `mtlib.book.hand`: it reads its numbers from the JSON beside it, and draws into `.hand-live`. All text is set as
// text. What stands in `.hand-plain` says the same where no script runs, on paper, and on demand.

function element(space, name, attributes, ...children) {
  const made = space ? document.createElementNS(space, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  made.append(...children);
  return made;
}
const html = (name, attributes, ...children) => element("", name, attributes, ...children);
const svg = (name, attributes, ...children) =>
  element("http://www.w3.org/2000/svg", name, attributes, ...children);
const minus = (number) => String(number).replace("-", "\u2212");
const mark = (colour, kind) => {
  const made = html("span", { class: `hand-mark ${kind}`, "aria-hidden": "true" });
  if (kind == "box") made.style.background = colour;
  else if (colour) made.style.color = colour;
  return made;
};

// A line as it is drawn in the picture: families differ without their colours, too.
const DASHES = { truth: "6 4", meta: "none", transfer: "14 4", baseline: "2 4" };
const drawn = (colour, family) => {
  const stroke = { "stroke-width": family == "truth" ? 1.5 : 2.5, "stroke-dasharray": DASHES[family] };
  return { stroke: colour || "currentColor", ...stroke };
};
const sample = (colour, family) =>
  svg("svg", { class: "hand-line", viewBox: "0 0 36 6", "aria-hidden": "true" },
    svg("line", { x1: 0, x2: 36, y1: 3, y2: 3, ...drawn(colour, family) }));

// Curves at a grid of settings, a slider for each of its axes.
function sliders(live, data) {
  const at = data.start.slice();
  const plot = svg("svg", { role: "img", "aria-label": data.alt });
  const said = html("p", { class: "hand-heard", role: "status" });
  const values = data.ways.map(() => html("span"));
  const key = html(
    "ul",
    { class: "hand-key" },
    html("li", {}, sample("", "truth"), data.truth.name),
    html("li", {}, mark("", "dot"), data.points.name),
    ...data.ways.map((way, i) => html("li", {}, sample(way.colour, way.family), `${way.name}: error `, values[i])),
  );
  const told = (value) => (value === null ? data.beyond : value.toFixed(2));

  const controls = data.axes.map((axis, i) => {
    const input = html("input", {
      type: "range", min: 0, max: axis.values.length - 1, step: 1, "aria-label": axis.name,
    });
    input.value = at[i];
    const shown = html("output");
    input.addEventListener("input", () => {
      at[i] = Number(input.value);
      draw();
    });
    const show = () => {
      shown.textContent = axis.values[at[i]];
      input.setAttribute("aria-valuetext", `${axis.values[at[i]]} ${axis.unit}`.trim());
    };
    return { show, row: html("label", { class: "hand-slider" }, html("span", {}, axis.name), input, shown) };
  });

  function draw() {
    controls.forEach((c) => c.show());
    const width = Math.max(260, Math.round(live.clientWidth) || 600);
    const height = Math.round(Math.min(330, Math.max(230, width / 2)));
    const [left, right, top, bottom] = [30, 6, 6, 36];
    const [x0, x1] = data.xlim, [y0, y1] = data.ylim;
    const px = (x) => ((x - x0) / (x1 - x0)) * (width - left - right);
    const py = (y) => ((y1 - y) / (y1 - y0)) * (height - top - bottom);
    const line = (row, look) => {
      // Where a curve is no number it has a hole; the frame cuts what is outside of it.
      const parts = [[]];
      row.forEach((y, i) => {
        if (y === null) parts.push([]);
        else parts.at(-1).push(`${px(data.x[i]).toFixed(1)},${py(y).toFixed(1)}`);
      });
      const path = parts.filter((p) => p.length).map((p) => `M${p.join("L")}`).join("");
      return svg("path", { d: path, fill: "none", ...look });
    };
    const inside = svg("svg", {
      x: left, y: top, width: width - left - right, height: height - top - bottom, style: "overflow: hidden",
    });
    const grid = { stroke: "currentColor", "stroke-opacity": 0.15 };
    const marks = [];
    for (const x of data.xticks) {
      inside.append(svg("line", { x1: px(x), x2: px(x), y1: 0, y2: height, ...grid }));
      marks.push(svg("text", { x: left + px(x), y: height - bottom + 15, "text-anchor": "middle" }, minus(x)));
    }
    for (const y of data.yticks) {
      inside.append(svg("line", { x1: 0, x2: width, y1: py(y), y2: py(y), ...grid }));
      marks.push(svg("text", { x: left - 5, y: top + py(y) + 4, "text-anchor": "end" }, minus(y)));
    }
    marks.push(svg("text", { x: (left + width) / 2, y: height - 3, "text-anchor": "middle" }, "x"));
    inside.append(line(data.truth.y, drawn("", "truth")));
    data.ways.forEach((way) =>
      inside.append(line(way.curves[at[0]][at[1]], { ...drawn(way.colour, way.family), class: "hand-curve" })),
    );
    data.points.x.forEach((x, i) =>
      inside.append(svg("circle", { cx: px(x), cy: py(data.points.y[i]), r: 4, fill: "currentColor" })),
    );
    plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
    plot.replaceChildren(inside, ...marks);
    const errors = data.ways.map((way) => way.errors[at[0]][at[1]]);
    errors.forEach((e, i) => (values[i].textContent = told(e)));
    const settings = data.axes.map((axis, i) => `${axis.name} ${axis.values[at[i]]}`).join(", ");
    said.textContent =
      `${settings}. ${data.error}: ` + data.ways.map((w, i) => `${w.name} ${told(errors[i])}`).join(", ") + ".";
  }

  live.append(html("div", { class: "hand-row" }, ...controls.map((c) => c.row)), plot, key, said);
  draw();
  if (window.ResizeObserver) {
    let width = live.clientWidth;
    new ResizeObserver(() => {
      if (live.clientWidth != width) draw();
      width = live.clientWidth;
    }).observe(live);
  }
}

// A table for each level, and buttons that choose the level.
function matrix(live, data) {
  let at = 0;
  const group = `hand-${Math.random().toString(36).slice(2)}`;
  const said = html("p", { class: "hand-said", role: "status" });
  const caption = html("caption");
  const cells = data.rows.map(() => data.columns.map(() => html("td")));
  const table = html(
    "table",
    {},
    caption,
    html("thead", {}, html("tr", {}, ...[data.corner, ...data.columns].map((c) => html("th", { scope: "col" }, c)))),
    html(
      "tbody",
      {},
      ...data.rows.map((row, i) =>
        html("tr", {}, html("th", { scope: "row" }, mark(row.colour, "box"), ` ${row.name}`), ...cells[i]),
      ),
    ),
  );
  const choices = data.levels.map((level, i) => {
    const input = html("input", { type: "radio", name: group, value: i });
    input.checked = i == at;
    input.addEventListener("change", () => {
      at = i;
      show();
    });
    return html("label", { class: "hand-choice" }, input, level.name);
  });

  function show() {
    const level = data.levels[at];
    caption.textContent = `${data.measure}, ${data.axis}: ${level.name}`;
    level.cells.forEach((row, i) =>
      row.forEach((cell, j) => {
        const td = cells[i][j];
        td.replaceChildren(cell.text, ...(cell.half ? [" ", html("small", {}, cell.half)] : []));
        td.className = cell.is;
        const share = cell.share === null ? 0 : Math.round(45 * cell.share);
        td.style.backgroundColor = `color-mix(in srgb, ${data.rows[i].colour} ${share}%, transparent)`;
      }),
    );
    said.textContent = level.said;
  }

  live.classList.add("twice");
  live.append(
    html("fieldset", { class: "hand-row" }, html("legend", {}, `${data.axis}:`), ...choices), table, said,
  );
  show();
}

// Questions with yes and no, the answers so far, and a link at the end.
function path(live, data) {
  const taken = [];
  const asked = html("ol", { class: "hand-asked" });
  const text = html("p");
  const link = html("a");
  const now = html("div", { class: "hand-now", "aria-live": "polite" }, text, link);
  const button = (name, act) => {
    const made = html("button", { type: "button" }, name);
    made.addEventListener("click", act);
    return made;
  };
  const yes = button(data.words.yes, () => go("yes"));
  const no = button(data.words.no, () => go("no"));
  const back = button(data.words.back, () => undo(taken.length - 1));
  const again = button(data.words.again, () => undo(0));

  function go(answer) {
    taken.push(answer);
    if (show()) link.focus();
  }
  function undo(left) {
    taken.length = left;
    show();
    if (!left) yes.focus();
  }
  function show() {
    let at = data.root;
    asked.replaceChildren(
      ...taken.map((answer) => {
        const step = html("li", {}, `${at.text} `, html("strong", {}, data.words[answer]));
        at = at[answer];
        return step;
      }),
    );
    const end = !at.yes;
    text.textContent = at.text;
    now.classList.toggle("end", end);
    link.hidden = !end;
    yes.hidden = no.hidden = end;
    back.disabled = again.disabled = !taken.length;
    if (end) {
      link.textContent = at.title;
      link.setAttribute("href", at.href);
    }
    return end;
  }

  live.classList.add("twice");
  live.append(asked, now, html("div", { class: "hand-row" }, yes, no, back, again));
  show();
}

function hand(root) {
  root.dataset.ready = "1";
  const [live, plain] = [".hand-live", ".hand-plain"].map((c) => root.querySelector(c));
  const data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
  // Outside of the book a page is the published one, or else the notebook beside this one.
  const book = document.querySelector("article.bd-article");
  const { base = "" } = root.dataset;
  const place = (page, at) => (book || base ? `${base}${page}.html${at}` : `${page}.ipynb`);
  const linked = (node) => {
    if (node.page) node.href = place(node.page, node.section && `#${node.section}`);
    else if (node.yes) [node.yes, node.no].forEach(linked);
  };
  if (data.root) linked(data.root);
  for (const a of plain.querySelectorAll("a[data-page]")) a.setAttribute("href", place(a.dataset.page, a.dataset.at));
  ({ sliders, matrix, path })[root.dataset.kind](live, data);
  const opened = html("button", { type: "button", class: "hand-plain-button", "aria-expanded": "false" }, data.plain);
  opened.addEventListener("click", () => {
    opened.setAttribute("aria-expanded", String(!plain.classList.toggle("closed")));
  });
  plain.classList.add("closed");
  plain.before(opened);
}
