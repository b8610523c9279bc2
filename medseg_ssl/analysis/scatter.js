// Two inits against each other, a point per case, and the sorted differences beside it.
const BETTER = "#009e73", WORSE = "#d55e00", GRID = "#e8eaee", INK = "#22262d";
const FONT = {family: "-apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif", size: 13, color: INK};
const escaped = (text) => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);

for (const box of document.querySelectorAll(".two-inits")) {
  const data = JSON.parse(box.querySelector("script").textContent), pick = {};
  for (const select of box.querySelectorAll("select")) pick[select.dataset.role] = select;
  const chosen = (role) => pick[role] ? Number(pick[role].value) : 0;
  const config = {responsive: true, displaylogo: false, displayModeBar: false};

  const draw = () => {
    const x = chosen("x"), y = chosen("y"), budget = chosen("budget"), kind = chosen("class");
    const [across, up] = [x, y].map((init) => data.dice[init][budget][kind]);
    const names = [data.inits[x], data.inits[y]].map(escaped);
    const both = data.cases.map((key, i) => ({key, a: across[i], b: up[i]})).filter((p) => p.a !== null && p.b !== null);
    const all = both.flatMap((p) => [p.a, p.b]), low = Math.max(0, Math.min(1, ...all) - 0.03), high = Math.min(1, Math.max(0, ...all) + 0.03);
    const tint = (p) => p.b > p.a ? BETTER : p.b < p.a ? WORSE : "#8a8f98";
    const hover = (p) => [p.key.slice(0, 8), p.a.toFixed(3), p.b.toFixed(3), (p.b - p.a >= 0 ? "+" : "−") + Math.abs(p.b - p.a).toFixed(3)];
    const words = `<b>case %{customdata[0]}</b><br>${names[0]} %{customdata[1]}<br>${names[1]} %{customdata[2]}<br>difference %{customdata[3]}<extra></extra>`;
    const axis = (title) => ({title: {text: title}, range: [low, high], gridcolor: GRID, zeroline: false});
    const look = {font: FONT, paper_bgcolor: "white", plot_bgcolor: "white", showlegend: false, hovermode: "closest", margin: {l: 58, r: 12, t: 14, b: 52}};
    Plotly.react(box.querySelector(".points"), [{
      type: "scatter", mode: "markers", x: both.map((p) => p.a), y: both.map((p) => p.b), customdata: both.map(hover), hovertemplate: words,
      marker: {size: 9, opacity: 0.8, color: both.map(tint), line: {color: "white", width: 1}},
    }], {
      ...look, xaxis: axis(`Dice, ${names[0]}`), yaxis: {...axis(`Dice, ${names[1]}`), scaleanchor: "x"},
      shapes: [{type: "line", x0: low, y0: low, x1: high, y1: high, line: {color: "#8a8f98", width: 1.3, dash: "dot"}, layer: "below"}],
    }, config);
    const sorted = [...both].sort((p, q) => (p.b - p.a) - (q.b - q.a));
    Plotly.react(box.querySelector(".steps"), [{
      type: "bar", x: sorted.map((_, i) => i + 1), y: sorted.map((p) => p.b - p.a), customdata: sorted.map(hover), hovertemplate: words,
      marker: {color: sorted.map(tint)},
    }], {
      ...look, bargap: 0.15, xaxis: {title: {text: "cases, sorted"}, showgrid: false, zeroline: false},
      yaxis: {title: {text: `${names[1]} less ${names[0]}`}, gridcolor: GRID, zerolinecolor: "#8a8f98"},
    }, config);
    const won = both.filter((p) => p.b > p.a).length, mean = both.reduce((s, p) => s + p.b - p.a, 0) / both.length;
    const draws = data.draws[budget];
    box.querySelector(".numbers").textContent = !both.length ? "No case has a score under both." :
      `${data.inits[y]} is better in ${won} of ${both.length} cases; mean difference ${mean >= 0 ? "+" : "−"}${Math.abs(mean).toFixed(3)} (${draws} draw${draws > 1 ? "s" : ""}).`;
    const keys = {points: both.map((p) => p.key), steps: sorted.map((p) => p.key)};
    box.keys = {...keys, init: data.inits[y], budget: data.budgets[budget]};
  };

  draw();
  for (const select of Object.values(pick)) select.addEventListener("change", draw);
  for (const part of ["points", "steps"]) {
    box.querySelector("." + part).on("plotly_click", (e) => {
      const key = box.keys[part][e.points[0].pointIndex], {init, budget} = box.keys;
      // that of this comparison: another one on the page may hold the same case
      document.getElementById(box.dataset.viewer)?.viewer.show(key, init, budget);
    });
  }
}
