"use strict";
/* Elements and inline SVG charts. Text of the data only ever becomes a text node. */

function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made && name !== "list") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const percent = (value) => `${Math.round(100 * value)}%`;

/* A number in as few characters as tell it: 4 significant digits, a true minus. */
function number(value, sign = false) {
  if (value === null || value === undefined || Number.isNaN(value)) return "—";
  const size = Math.abs(value);
  let text = size === 0 ? "0" : size >= 1e5 || size < 1e-3 ? size.toExponential(2) : String(Number(size.toPrecision(4)));
  if (size >= 1e-3 && size < 100) text = size.toFixed(size < 0.1 ? 4 : size < 10 ? 3 : 2);
  return (value < 0 ? "\u2212" : sign && value > 0 ? "+" : "") + text;
}

/* Round steps between 0 and the end of an axis. */
function ticks(end, count) {
  const rough = end / count, power = 10 ** Math.floor(Math.log10(rough || 1));
  const step = [1, 2, 5, 10].find((k) => k * power >= rough) * power;
  const found = [];
  for (let at = 0; at <= end * 1.0001; at += step) found.push(Number(at.toPrecision(12)));
  return found;
}

const WIDTH = 440, HEIGHT = 190, LEFT = 36, RIGHT = 10, TOP = 8, BOTTOM = 30;

/* Axes of a chart from iteration 0 to `end` and from 0 to `most`; returns [svg, x, y]. */
function axes(end, most, label, say) {
  const x = (at) => LEFT + (at / Math.max(end, 1)) * (WIDTH - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - (value / most) * (HEIGHT - TOP - BOTTOM);
  const made = svg("svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": say });
  for (const value of ticks(most, 4)) {
    made.append(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }),
      svg("text", { x: LEFT - 5, y: y(value) + 4, "text-anchor": "end" }, label(value)));
  }
  for (const at of ticks(Math.max(end, 1), 6).filter(Number.isInteger)) {
    made.append(svg("text", { x: x(at), y: HEIGHT - 6, "text-anchor": "middle" }, String(at)));
  }
  return [made, x, y];
}

const path = (points, x, y) => points.map(([at, value], i) => `${i ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`).join("");

/* Points averaged with those before them, over a fortieth of them all. */
function smooth(points) {
  const window = Math.max(1, Math.floor(points.length / 40));
  return points.map(([at], i) => {
    const part = points.slice(Math.max(0, i - window + 1), i + 1);
    return [at, part.reduce((sum, p) => sum + p[1], 0) / part.length];
  });
}

function card(title, note, ...children) {
  return el("div", { className: "card" }, el("h2", {}, title, el("small", {}, note)), ...children);
}

const key = (name, kind, text) => el("span", {}, el("i", { className: `${kind} ${name}` }), text);

/* What the points are at the pointer's iteration, written into `said`. */
function follow(made, x, end, said, text) {
  const before = said.textContent, cross = svg("line", { class: "cross", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  made.append(cross);
  made.addEventListener("pointermove", (event) => {
    const box = made.getBoundingClientRect(), scale = Math.min(box.width / WIDTH, box.height / HEIGHT);
    const left = (box.width - scale * WIDTH) / 2;
    const at = ((event.clientX - box.left - left) / scale - LEFT) / (WIDTH - LEFT - RIGHT);
    const iteration = Math.round(Math.min(1, Math.max(0, at)) * end);
    for (const name of ["x1", "x2"]) cross.setAttribute(name, x(iteration));
    cross.setAttribute("visibility", "visible");
    said.textContent = text(iteration);
  });
  made.addEventListener("pointerleave", () => {
    cross.setAttribute("visibility", "hidden");
    said.textContent = before;
  });
}

const nearest = (points, at) => points.reduce((best, p) => (Math.abs(p[0] - at) < Math.abs(best[0] - at) ? p : best));

function successChart(curves, end, kept, choose) {
  const last = curves.eval.at(-1);
  const say = last ? `Success on held-out tasks ends at ${percent(last[1])}` : "Success in training";
  const [made, x, y] = axes(end, 1, percent, say);
  if (curves.eval.length) {
    const low = curves.eval.map((p) => [p[0], p[2]]), high = curves.eval.map((p) => [p[0], p[3]]);
    made.append(svg("path", { class: "band f1", d: path(high, x, y) + path(low.reverse(), x, y).replace("M", "L") + "Z" }));
  }
  if (curves.train.length) made.append(svg("path", { class: "thin s2", d: path(smooth(curves.train), x, y) }));
  if (curves.eval.length) {
    made.append(svg("path", { class: "line s1", d: path(curves.eval, x, y) }));
    for (const [at, value] of curves.eval) made.append(svg("circle", { class: "f1", cx: x(at), cy: y(value), r: 3 }));
  }
  for (const at of kept) {
    const mark = svg("g", { class: "kept", "data-iteration": at },
      svg("path", { d: `M${x(at) - 5} ${HEIGHT - BOTTOM + 8}L${x(at)} ${HEIGHT - BOTTOM}L${x(at) + 5} ${HEIGHT - BOTTOM + 8}Z` }),
      svg("title", {}, `See the rollout of iteration ${at}`));
    mark.addEventListener("click", () => choose(String(at)));
    made.append(mark);
  }
  const small = last ? `${percent(curves.eval[0][1])} → ${percent(last[1])}` : "";
  const result = card("Success", small, made, el("div", { className: "key" },
    ...(curves.eval.length ? [key("k1", "", "held-out, 95% interval")] : []), key("k2", "thin", "training"),
    ...(kept.length ? [el("span", {}, "▲ rollout below")] : [])));
  follow(made, x, end, result.querySelector("small"), (at) => {
    const held = curves.eval.length ? nearest(curves.eval, at) : null, train = curves.train.length ? nearest(curves.train, at) : null;
    return `iteration ${at}: ` + [held && `held-out ${percent(held[1])}`, train && `training ${percent(train[1])}`].filter(Boolean).join(", ");
  });
  return result;
}

/* A row of `name, curve, first → last`. */
function spark(name, points, show, end, most) {
  const x = (at) => 3 + (at / Math.max(end, 1)) * 194, y = (value) => 21 - (value / (most || 1)) * 18;
  const made = svg("svg", { viewBox: "0 0 200 24", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("line", { class: "grid", x1: 0, x2: 200, y1: 21, y2: 21, "vector-effect": "non-scaling-stroke" }));
  if (points.length) made.append(svg("path", { class: "line s1", d: path(points, x, y), "vector-effect": "non-scaling-stroke" }));
  const text = points.length ? `${show(points[0][1])} → ${show(points.at(-1)[1])}` : "—";
  return [el("span", { title: name }, name), made, el("b", {}, text)];
}

function kindsChart(curves, end) {
  const rows = Object.entries(curves.kinds).flatMap(([name, points]) => spark(name.replaceAll("_", " "), points, percent, end, 1));
  return card("Success by task type", curves.kinds_of, el("div", { className: "kinds" }, ...rows));
}

function timeChart(curves, end) {
  const parts = Object.entries(curves.time).map(([name, points]) => [name, new Map(points)]);
  const sums = parts.map(([name, at]) => [name, [...at.values()].reduce((a, b) => a + b, 0)]);
  const whole = sums.reduce((sum, [, value]) => sum + value, 0);
  const xs = [...new Set(parts.flatMap(([, at]) => [...at.keys()]))].sort((a, b) => a - b);
  const total = (at) => parts.reduce((sum, [, values]) => sum + (values.get(at) || 0), 0);
  const most = Math.max(1e-9, ...xs.map(total));
  const [made, x, y] = axes(end, most, String, "Seconds of each part of an iteration");
  const wide = Math.max(1.5, Math.min(18, (0.8 * (WIDTH - LEFT - RIGHT)) / Math.max(end, 1)));
  const paths = parts.map(() => "");
  for (const at of xs) {
    let base = 0;
    parts.forEach(([, values], k) => {
      const value = values.get(at) || 0, left = Math.max(LEFT, x(at) - wide / 2);
      if (value) paths[k] += `M${left.toFixed(1)} ${y(base).toFixed(1)}V${y(base + value).toFixed(1)}h${wide.toFixed(1)}V${y(base).toFixed(1)}Z`;
      base += value;
    });
  }
  paths.forEach((d, k) => made.append(svg("path", { class: `area f${(k % 4) + 1}`, d })));
  const keys = sums.map(([name, value], k) => key(`k${(k % 4) + 1}`, "box", `${name === "eval" ? "evaluation" : name} ${percent(value / whole)}`));
  const result = card("Time", "seconds of an iteration", made, el("div", { className: "key" }, ...keys));
  follow(made, x, end, result.querySelector("small"), (at) => `iteration ${at}: ${number(total(at))} s`);
  return result;
}

function drawCurves(host, curves, kept, choose) {
  const all = [curves.train, curves.eval, ...Object.values(curves.time)].flat();
  const end = Math.max(1, ...all.map((p) => p[0]));
  host.append(successChart(curves, end, kept, choose));
  if (Object.keys(curves.kinds).length) host.append(kindsChart(curves, end));
  if (Object.keys(curves.time).length) host.append(timeChart(curves, end));
  const more = Object.entries(curves.more).map(([name, points]) => {
    const share = name.includes("valid") || name.includes("mixed");
    const most = share ? 1 : Math.max(...points.map((p) => p[1]));
    const show = share ? percent : (value) => String(Number(value.toPrecision(2)));
    return el("div", { className: "kinds" }, ...spark(name, smooth(points), show, end, Math.max(most, 1e-9)));
  });
  if (more.length) host.append(el("div", { className: "card more" }, ...more));
  host.hidden = false;
}
