// Plotly figures; of several in one place, buttons choose which is shown.
for (const box of document.querySelectorAll(".figure")) {
  const figures = JSON.parse(box.querySelector("script").textContent);
  const plot = box.querySelector(".plot"), buttons = box.querySelectorAll("button");
  // not the first key: keys that look like integers come before all others
  let shown = buttons.length ? buttons[0].dataset.show : Object.keys(figures)[0];
  const show = (name) => {
    shown = name;
    const chosen = figures[name], layout = structuredClone(chosen.layout), narrow = plot.clientWidth < 560;
    // on a narrow screen names in two columns below the axes, and room for them
    const rows = narrow && layout.showlegend ? Math.ceil(chosen.data.length / 2) : 0;
    plot.style.height = rows ? `${360 + 22 * rows}px` : "";
    if (rows) {
      layout.legend = {orientation: "h", x: 0, y: -76 / 270, yanchor: "top", maxheight: 1,
        entrywidth: 0.48, entrywidthmode: "fraction", font: {size: 12}};
    }
    Plotly.react(plot, chosen.data, layout,
      {responsive: true, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]]});
    for (const b of buttons) b.setAttribute("aria-pressed", b.dataset.show === name);
  };
  for (const b of buttons) b.addEventListener("click", () => show(b.dataset.show));
  matchMedia("(max-width: 760px)").addEventListener("change", () => show(shown));
  show(shown);
}
