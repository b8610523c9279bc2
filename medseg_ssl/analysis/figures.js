// Plotly figures; of several in one place, buttons choose which is shown.
for (const box of document.querySelectorAll(".figure")) {
  const figures = JSON.parse(box.querySelector("script").textContent);
  const plot = box.querySelector(".plot"), buttons = box.querySelectorAll("button");
  const show = (name) => {
    const chosen = figures[name];
    Plotly.react(plot, chosen.data, chosen.layout,
      {responsive: true, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]]});
    for (const b of buttons) b.setAttribute("aria-pressed", b.dataset.show === name);
  };
  for (const b of buttons) b.addEventListener("click", () => show(b.dataset.show));
  show(Object.keys(figures)[0]);
}
