"use strict";
(() => {
  const root = document.documentElement;
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const narrow = matchMedia("(max-width: 600px)").matches;
  const settings = { responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover" };

  const colours = () => {
    const style = getComputedStyle(root);
    const line = style.getPropertyValue("--line").trim();
    return {
      "font.color": style.getPropertyValue("--ink").trim(),
      "xaxis.gridcolor": line, "yaxis.gridcolor": line,
      "xaxis.zerolinecolor": line, "yaxis.zerolinecolor": line,
    };
  };

  const theme = document.getElementById("theme");
  const paint = (dark) => {
    root.dataset.theme = dark ? "dark" : "light";
    theme.setAttribute("aria-pressed", String(dark));
    for (const name of Object.keys(charts)) {
      const place = document.getElementById(name);
      if (place.data) Plotly.relayout(place, colours());
    }
  };
  root.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  for (const [name, chart] of Object.entries(charts)) {
    Plotly.newPlot(name, chart.data, chart.layout, settings).then((place) =>
      Plotly.relayout(place, colours()));
  }
  theme.setAttribute("aria-pressed", String(root.dataset.theme === "dark"));
  theme.addEventListener("click", () => paint(root.dataset.theme !== "dark"));

  const part = document.getElementById("part");
  if (!part) return;
  const mode = document.getElementById("mode");
  const search = document.getElementById("node");
  const found = document.getElementById("found");
  const drawn = [...document.querySelectorAll("template.drawn")];
  const views = {};

  const show = (place, wanted) => {
    const holder = document.getElementById(place);
    if (views[place]) views[place].destroy();
    const source = drawn.find((d) => d.dataset.part === part.value && d.dataset.mode === wanted);
    holder.replaceChildren(source.content.cloneNode(true));
    holder.classList.remove("looking");
    views[place] = svgPanZoom(holder.querySelector("svg"), {
      controlIconsEnabled: true, zoomScaleSensitivity: 0.3, minZoom: 0.2, maxZoom: 40,
    });
  };
  const redraw = () => {
    show("before", "plain");
    show("after", mode.value);
    document.getElementById("after-caption").textContent = `Rewritten: ${mode.value}`;
  };

  const steps = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
  for (const place of ["before", "after"]) {
    document.getElementById(place).addEventListener("keydown", (event) => {
      const view = views[place];
      if (steps[event.key]) view.panBy({ x: steps[event.key][0], y: steps[event.key][1] });
      else if (event.key === "+" || event.key === "=") view.zoomIn();
      else if (event.key === "-") view.zoomOut();
      else if (event.key === "0") { view.resetZoom(); view.center(); }
      else return;
      event.preventDefault();
    });
  }

  const about = (group) => `${group.dataset.node}\n${group.querySelector("title")?.textContent ?? ""}`;
  const bounds = (hits) => {
    const boxes = hits.map((group) => group.getBoundingClientRect());
    const left = Math.min(...boxes.map((b) => b.left)), right = Math.max(...boxes.map((b) => b.right));
    const top = Math.min(...boxes.map((b) => b.top)), bottom = Math.max(...boxes.map((b) => b.bottom));
    return { width: right - left, height: bottom - top, x: (left + right) / 2, y: (top + bottom) / 2 };
  };
  const closest = { before: 4, after: 12 };  // a layer alone would fill the frame
  // The viewer moves its drawing with the next frame, not at once.
  const settled = (then) => requestAnimationFrame(() => requestAnimationFrame(then));
  // Moves what was found into the middle, as large as fits well.
  const aim = (place, hits) => settled(() => {
    if (!hits.length || !hits[0].isConnected) return;  // another graph is shown by now
    const frame = bounds([document.getElementById(place)]), before = bounds(hits);
    const fit = 0.85 * Math.min(frame.width / before.width, frame.height / before.height);
    views[place].zoomBy(Math.min(Math.max(fit, 0.2), closest[place]));
    settled(() => {
      if (!hits[0].isConnected) return;
      const after = bounds(hits);
      views[place].panBy({ x: frame.x - after.x, y: frame.y - after.y });
      document.getElementById(place).dataset.aimed = search.value.trim();
    });
  });
  const groups = (holder) => [...holder.querySelectorAll("g[data-node]:not(.legend)")];

  // What was found, and the edges that lead to it, stay as they are; the rest fades.
  const mark = (place, hits) => {
    const holder = document.getElementById(place), names = new Set(hits.map((g) => g.dataset.node));
    holder.classList.add("looking");
    const near = [...holder.querySelectorAll("g[data-target]")].filter((edge) => names.has(edge.dataset.target));
    for (const group of [...hits, ...near]) group.classList.add("looked-for");
  };

  // A layer is looked for in all drawings: the part that holds it is opened by itself.
  let looked = "";
  const look = () => {
    const wanted = looked = search.value.trim();
    if (!wanted) { found.textContent = ""; redraw(); return; }
    const hit = (group) => about(group).includes(wanted);
    const whole = drawn.filter((d) => d.dataset.mode === mode.value && d.dataset.part !== part.options[0].value);
    const ranked = whole
      .map((d) => ({ part: d.dataset.part, hits: groups(d.content).filter(hit).length }))
      .filter((entry) => entry.hits);
    if (!ranked.length) { found.textContent = "nothing of that name in this mode"; return; }
    const best = ranked.find((entry) => wanted.startsWith(entry.part)) ?? ranked[0];
    part.value = best.part;
    redraw();
    const [plain, rewritten] = ["before", "after"].map((place) =>
      groups(document.getElementById(place)).filter(hit));
    for (const [place, hits] of [["before", plain], ["after", rewritten]]) {
      mark(place, hits);
      aim(place, hits);
    }
    const fate = [...document.querySelectorAll("#layers option")].find((o) => o.value === wanted)?.label;
    const counts = [["inserted", "inserted"], ["removed", "removed"], ["kept values read", "cache"]]
      .map(([what, kind]) => [rewritten.filter((group) => group.dataset.mark === kind).length, what])
      .filter(([count]) => count).map(([count, what]) => `${count} ${what}`);
    found.textContent = `${wanted}: ${[...(fate ? [fate] : []), ...counts].join(", ") || "as it was"}`;
  };

  part.addEventListener("change", () => { search.value = looked = ""; found.textContent = ""; redraw(); });
  mode.addEventListener("change", () => (search.value ? look() : redraw()));
  let typed;
  search.addEventListener("input", () => { clearTimeout(typed); typed = setTimeout(look, 300); });
  // Leaving the field must not undo how the reader has moved a graph that is there already.
  search.addEventListener("change", () => { clearTimeout(typed); if (search.value.trim() !== looked) look(); });
  for (const link of document.querySelectorAll("button.to-graph")) {
    link.addEventListener("click", () => {
      search.value = link.dataset.layer;
      look();
      document.getElementById("graphs").scrollIntoView();
      document.getElementById("after").focus({ preventScroll: true });
    });
  }
  redraw();
})();
