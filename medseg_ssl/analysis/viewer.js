// The slice viewer. A volume's bytes run x fastest (patient's right), then y (anterior), then z (superior).
// A plane is a first byte and the steps from row to row and column to column: rows run down the screen.
const PLANES = {
  axial: {
    axis: 0, rows: 1, columns: 2, ends: ["A", "P", "R", "L"],
    grid: ([d, h, w], k) => ({first: k * h * w + (h - 1) * w + (w - 1), down: -w, right: -1}),
  },
  coronal: {
    axis: 1, rows: 0, columns: 2, ends: ["S", "I", "R", "L"],
    grid: ([d, h, w], k) => ({first: (d - 1) * h * w + k * w + (w - 1), down: -h * w, right: -1}),
  },
  sagittal: {
    axis: 2, rows: 0, columns: 1, ends: ["S", "I", "A", "P"],
    grid: ([d, h, w], k) => ({first: (d - 1) * h * w + (h - 1) * w + k, down: -h * w, right: -w}),
  },
};
const TRUTH = "#ffffff", BOTH = [96, 211, 148], MISSED = [76, 162, 255], EXTRA = [255, 140, 46], UNKNOWN = [150, 150, 150];

async function unpack(words) {
  const bytes = Uint8Array.from(atob(words), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

// Pixels of one slice: "shade" gives red, green, blue and opacity of the voxel at a place.
function raster(plane, shape, at, shade) {
  const rows = shape[plane.rows], columns = shape[plane.columns], grid = plane.grid(shape, at);
  const sheet = new OffscreenCanvas(columns, rows), context = sheet.getContext("2d");
  const pixels = context.createImageData(columns, rows), out = pixels.data;
  for (let r = 0, i = 0; r < rows; r++) {
    for (let c = 0, place = grid.first + r * grid.down; c < columns; c++, i += 4, place += grid.right) {
      const colour = shade(place);
      if (colour) { out[i] = colour[0]; out[i + 1] = colour[1]; out[i + 2] = colour[2]; out[i + 3] = colour[3]; }
    }
  }
  context.putImageData(pixels, 0, 0);
  return sheet;
}

// Edges of voxels between a class and anything else, a path per class.
function outlines(plane, shape, at, label, shown, frame) {
  const rows = shape[plane.rows], columns = shape[plane.columns], grid = plane.grid(shape, at);
  const paths = new Map(), sx = frame.width / columns, sy = frame.height / rows;
  const value = (r, c) => r < 0 || c < 0 || r >= rows || c >= columns ? 0 : label[grid.first + r * grid.down + c * grid.right];
  for (let r = 0; r < rows; r++) {
    for (let c = 0; c < columns; c++) {
      const own = value(r, c);
      if (!shown.has(own)) continue;
      let path = paths.get(own);
      if (!path) paths.set(own, path = new Path2D());
      const left = frame.x + c * sx, top = frame.y + r * sy, right = left + sx, bottom = top + sy;
      if (value(r, c - 1) !== own) { path.moveTo(left, top); path.lineTo(left, bottom); }
      if (value(r, c + 1) !== own) { path.moveTo(right, top); path.lineTo(right, bottom); }
      if (value(r - 1, c) !== own) { path.moveTo(left, top); path.lineTo(right, top); }
      if (value(r + 1, c) !== own) { path.moveTo(left, bottom); path.lineTo(right, bottom); }
    }
  }
  return paths;
}

class Viewer {
  constructor(box) {
    this.box = box;
    this.colours = JSON.parse(box.dataset.colours);
    this.unknown = Number(box.dataset.unknown);
    this.cases = [...box.querySelectorAll("script.case")].map((s) => JSON.parse(s.textContent));
    this.unpacked = new Map();
    this.controls = {};
    for (const part of box.querySelectorAll("[data-role]")) this.controls[part.dataset.role] = part;
    this.planes = [...box.querySelectorAll(".plane")];
    this.at = [0, 0, 0];
    this.last = "axial";
    this.hidden = new Set();
    this.asked = 0;
    this.opened = 0;
    this.scanned = 0;
    this.listen();
    this.ready = this.open(0);
  }

  // -- what is shown -----------------------------------------------------------------------------------------

  get(words) {
    if (!this.unpacked.has(words)) this.unpacked.set(words, unpack(words));
    return this.unpacked.get(words);
  }

  async open(index) {
    const c = this.controls, asked = ++this.opened, data = this.cases[index];
    this.scanned++; // of the case before
    c.case.value = String(index);
    this.image = this.label = this.heat = this.small = null; // the new scan may come before its prediction
    const truth = await this.get(data.truth);
    if (asked !== this.opened) return;
    this.data = data;
    this.truth = truth;
    this.unstated = new Set(data.known.flatMap((known, value) => known ? [] : [value]));
    this.at = this.fullest(truth);
    const names = this.data.channels.map((channel, i) => new Option(channel.name, String(i)));
    c.channel.replaceChildren(...names);
    c.channels.hidden = names.length < 2;
    for (const figure of this.planes) {
      figure.querySelector("input").max = String(this.data.shape[PLANES[figure.dataset.plane].axis] - 1);
    }
    this.legend();
    await this.scan();
  }

  async scan() {
    const c = this.controls, channel = this.data.channels[Number(c.channel.value)], asked = ++this.scanned;
    this.image = null; // what is chosen meanwhile must not be drawn over another scan
    const image = await this.get(channel.image);
    if (asked !== this.scanned) return; // another one was chosen meanwhile
    this.channel = channel;
    c.window.replaceChildren(...channel.presets.map((p, i) => new Option(p.name, String(i))));
    const low = channel.values[0], high = channel.values[255];
    Object.assign(c.level, {min: low, max: high, step: (high - low) / 500});
    Object.assign(c.width, {min: (high - low) / 500, max: high - low, step: (high - low) / 500});
    this.preset(0);
    this.image = image;
    await this.prediction();
  }

  preset(index) {
    const chosen = this.channel.presets[index];
    this.controls.window.value = String(index);
    this.controls.level.value = String(chosen.level);
    this.controls.width.value = String(chosen.width);
    this.level = chosen.level;
    this.width = chosen.width;
  }

  fit(init) {
    const budget = Number(this.controls.budget.value);
    return this.data.fits.find((f) => f.init === init && f.budget === budget);
  }

  async prediction() {
    const found = this.fit(this.controls.init.value), asked = ++this.asked;
    const label = found ? await this.get(found.label) : null;
    const heat = found && found.saliency ? await this.get(found.saliency) : null;
    if (asked !== this.asked || !this.image) return; // a scan that is on its way draws it
    this.label = label;
    this.heat = heat;
    if (this.controls.saliency) this.controls.saliency.disabled = !this.heat;
    this.numbers(found);
    await this.draw();
    await this.strip();
  }

  fullest(truth) {
    const [d, h, w] = this.data.shape, sums = [new Float64Array(d), new Float64Array(h), new Float64Array(w)];
    for (let z = 0, i = 0; z < d; z++) for (let y = 0; y < h; y++) for (let x = 0; x < w; x++, i++) {
      if (truth[i] && truth[i] !== this.unknown) { sums[0][z]++; sums[1][y]++; sums[2][x]++; }
    }
    return sums.map((sum, axis) => {
      const best = sum.indexOf(Math.max(...sum));
      return sum[best] > 0 ? best : Math.floor(this.data.shape[axis] / 2);
    });
  }

  numbers(found) {
    const c = this.controls, line = this.box.querySelector(".numbers");
    const parts = [];
    if (!found) parts.push(`${c.init.value} has no prediction with this number of labels.`);
    else {
      const {mean, ...classes} = found.dice;
      const each = Object.entries(classes).map(([name, value]) => `${name} ${value.toFixed(3)}`);
      parts.push(`${found.init}, ${c.budget.selectedOptions[0].text}, draw 0:`);
      parts.push(mean === undefined ? "no Dice" : `Dice ${mean.toFixed(3)}${each.length > 1 ? ` (${each.join(", ")})` : ""}`);
      if (found.outside > 0.005) parts.push(`· ${found.outside.toFixed(2)} ml of the prediction lie outside of this view`);
    }
    const unstated = [...this.unstated].map((value) => this.data.classes[value]);
    if (unstated.length) parts.push(`· nobody stated ${unstated.join(", ")} here`);
    if (this.data.thinned > 1) parts.push(`· shown at ${this.data.spacing.map((s) => s.toFixed(1)).join(" × ")} mm`);
    line.textContent = parts.join(" ");
  }

  legend() {
    const entries = this.data.classes.slice(1).map((name, index) => {
      const entry = document.createElement("label"), input = document.createElement("input");
      input.type = "checkbox";
      input.checked = !this.hidden.has(index + 1);
      input.addEventListener("change", () => {
        if (input.checked) this.hidden.delete(index + 1); else this.hidden.add(index + 1);
        this.draw();
      });
      const swatch = document.createElement("i");
      swatch.style.background = this.colours[index % this.colours.length];
      entry.append(input, swatch, name);
      return entry;
    });
    const key = document.createElement("span");
    this.key = key;
    this.box.querySelector(".legend").replaceChildren(...entries, key);
  }

  // -- drawing -----------------------------------------------------------------------------------------------

  async draw() {
    if (!this.image) return;
    for (const figure of this.planes) {
      const name = figure.dataset.plane, plane = PLANES[name], k = this.at[plane.axis];
      this.paint(figure.querySelector("canvas"), plane, k, this.label, {cross: true});
      figure.querySelector("input").value = String(k);
      const title = name[0].toUpperCase() + name.slice(1);
      figure.querySelector("figcaption").textContent = `${title}, slice ${k + 1} of ${this.data.shape[plane.axis]}`;
    }
    const errors = this.controls.style.value === "errors";
    const names = errors ? [["right", BOTH], ["missed", MISSED], ["too much or another class", EXTRA]] : [];
    if (errors && this.unstated.size) names.push(["nobody stated it", UNKNOWN]);
    const parts = names.map(([word, colour]) => {
      const swatch = document.createElement("i"), entry = document.createElement("b");
      swatch.style.background = `rgb(${colour})`;
      entry.append(swatch, word);
      return entry;
    });
    this.key.replaceChildren(...(errors ? parts : ["truth: white line · prediction: in the class's colour"]));
    if (this.small) this.small();
  }

  paint(canvas, plane, k, label, {cross}) {
    const ratio = window.devicePixelRatio || 1, side = Math.max(1, Math.round(canvas.clientWidth * ratio));
    if (canvas.width !== side || canvas.height !== side) { canvas.width = side; canvas.height = side; }
    const {shape, spacing} = this.data, c = this.controls, context = canvas.getContext("2d");
    const pad = cross ? 18 * ratio : 2 * ratio;
    // one scale for the three planes, so that a structure has one size in all of them
    const scale = (side - 2 * pad) / Math.max(...shape.map((n, i) => n * spacing[i]));
    const width = shape[plane.columns] * spacing[plane.columns] * scale;
    const height = shape[plane.rows] * spacing[plane.rows] * scale;
    const frame = {x: (side - width) / 2, y: (side - height) / 2, width, height};
    const place = (sheet) => context.drawImage(sheet, frame.x, frame.y, frame.width, frame.height);
    context.fillStyle = "#0b0d10";
    context.fillRect(0, 0, side, side);

    const grey = this.channel.values.map((v) => clamp(((v - this.level) / this.width + 0.5) * 255, 0, 255));
    const image = this.image, one = [0, 0, 0, 255];
    context.imageSmoothingEnabled = true;
    context.imageSmoothingQuality = "high";
    place(raster(plane, shape, k, (i) => { one[0] = one[1] = one[2] = grey[image[i]]; return one; }));

    const shown = new Set(this.data.classes.map((_, v) => v).filter((v) => v > 0 && !this.hidden.has(v)));
    const opacity = Number(c.opacity.value) * 255, style = c.style.value, truth = this.truth;
    const wantsTruth = c.truth.checked, wantsLabel = c.prediction.checked && label;
    if (c.saliency && c.saliency.checked && this.heat && cross) {
      const heat = this.heat;
      place(raster(plane, shape, k, (i) => {
        const v = heat[i] / 255;
        return [255, Math.round(255 * v), Math.round(50 * v), opacity * 1.6 * v];
      }));
    }
    context.imageSmoothingEnabled = false;
    if (style === "filled" && wantsLabel) {
      const paints = this.data.classes.map((_, v) => v && [...rgb(this.colours[(v - 1) % this.colours.length]), opacity]);
      place(raster(plane, shape, k, (i) => shown.has(label[i]) ? paints[label[i]] : null));
    }
    if (style === "errors" && label) {
      place(raster(plane, shape, k, (i) => {
        const is = truth[i], said = label[i];
        if (is === this.unknown) return [...UNKNOWN, opacity * 0.5];
        const real = shown.has(is), claimed = shown.has(said);
        if (!real && !claimed) return null;
        if (is === 0 && this.unstated.has(said)) return [...UNKNOWN, opacity];
        return [...(is === said ? BOTH : claimed ? EXTRA : MISSED), opacity * (is === said ? 0.7 : 1.5)];
      }));
    } else {
      const line = Math.max(1.25, (cross ? 1.8 : 1.2) * ratio);
      const stroke = (labels, width, colour) => {
        context.lineWidth = width;
        context.lineCap = "square";
        for (const [value, path] of outlines(plane, shape, k, labels, shown, frame)) {
          context.strokeStyle = colour(value);
          context.stroke(path);
        }
      };
      // truth is broader and below, so that it shows on both sides of a prediction that lies on it
      if (wantsTruth) stroke(truth, line * 1.6, () => TRUTH);
      if (wantsLabel && style === "contours") stroke(label, line, (v) => this.colours[(v - 1) % this.colours.length]);
    }
    if (cross) this.marks(context, plane, frame, scale, side, ratio);
    canvas.frame = frame;
  }

  marks(context, plane, frame, scale, side, ratio) {
    const {shape} = this.data, middle = side / 2, edge = 9 * ratio;
    const column = shape[plane.columns] - 1 - this.at[plane.columns], row = shape[plane.rows] - 1 - this.at[plane.rows];
    const x = frame.x + (column + 0.5) * frame.width / shape[plane.columns];
    const y = frame.y + (row + 0.5) * frame.height / shape[plane.rows];
    context.strokeStyle = "rgba(120, 200, 255, .45)";
    context.lineWidth = ratio;
    context.beginPath();
    context.moveTo(x, frame.y); context.lineTo(x, frame.y + frame.height);
    context.moveTo(frame.x, y); context.lineTo(frame.x + frame.width, y);
    context.stroke();
    context.fillStyle = "#f2c14e";
    context.font = `600 ${12 * ratio}px sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    const [top, bottom, left, right] = plane.ends;
    context.fillText(top, middle, edge);
    context.fillText(bottom, middle, side - edge);
    context.fillText(left, edge, middle);
    context.fillText(right, side - edge, middle);
    // the longest round length that fills at most a third of the picture
    const length = [100, 50, 20, 10, 5, 2, 1].find((mm) => mm * scale <= side / 3) || 1;
    const from = 10 * ratio, base = side - 10 * ratio;
    context.fillStyle = "#d7dbe2";
    context.fillRect(from, base, length * scale, 2 * ratio);
    context.textAlign = "left";
    context.font = `${11 * ratio}px sans-serif`;
    context.fillText(`${length} mm`, from, base - 8 * ratio);
  }

  async strip() {
    const details = this.box.querySelector(".strip"), holder = details.querySelector(".small");
    const inits = [...this.controls.init.options].map((o) => o.value).filter((init) => this.fit(init));
    details.hidden = inits.length < 2;
    this.small = null;
    if (details.hidden || !details.open) return;
    const asked = this.asked, labels = await Promise.all(inits.map((init) => this.get(this.fit(init).label)));
    if (asked !== this.asked || !this.image) return;
    const figures = inits.map((init) => {
      const figure = document.createElement("figure"), caption = document.createElement("figcaption");
      const mean = this.fit(init).dice.mean;
      caption.textContent = `${init}: ${mean === undefined ? "no Dice" : `Dice ${mean.toFixed(3)}`}`;
      figure.append(document.createElement("canvas"), caption);
      figure.addEventListener("click", () => this.choose("init", init));
      return figure;
    });
    holder.replaceChildren(...figures);
    this.small = () => {
      const plane = PLANES[this.last];
      figures.forEach((figure, i) => this.paint(figure.firstChild, plane, this.at[plane.axis], labels[i], {cross: false}));
    };
    this.small();
  }

  // -- hands -------------------------------------------------------------------------------------------------

  move(name, k) {
    const axis = PLANES[name].axis;
    this.last = name;
    this.at[axis] = clamp(k, 0, this.data.shape[axis] - 1);
    this.draw();
  }

  choose(role, value) {
    this.controls[role].value = value;
    return this.prediction();
  }

  // A case by its key, with an init and a number of labels where they are given; nothing where the page does not hold
  // the case, and what no control offers stays as it was.
  show(key, init, budget) {
    const index = this.cases.findIndex((item) => item.case === key);
    if (index < 0) return;
    for (const [role, value] of [["init", init], ["budget", budget]]) {
      const select = this.controls[role];
      if ([...select.options].some((option) => option.value === String(value))) select.value = String(value);
    }
    this.ready = this.open(index);
    this.box.scrollIntoView({behavior: "smooth", block: "start"});
  }

  listen() {
    const c = this.controls, redraw = () => this.draw();
    c.case.addEventListener("change", () => { this.ready = this.open(Number(c.case.value)); });
    c.channel.addEventListener("change", () => this.scan());
    for (const role of ["init", "budget"]) c[role].addEventListener("change", () => this.prediction());
    c.window.addEventListener("change", () => { this.preset(Number(c.window.value)); redraw(); });
    for (const role of ["level", "width"]) {
      c[role].addEventListener("input", () => { this[role] = Number(c[role].value); redraw(); });
    }
    for (const role of ["style", "truth", "prediction", "saliency", "opacity"]) {
      if (c[role]) c[role].addEventListener("input", redraw);
    }
    c.reset.addEventListener("click", () => {
      c.opacity.value = "0.5";
      this.preset(0);
      this.at = this.fullest(this.truth);
      redraw();
    });
    this.box.querySelector(".strip").addEventListener("toggle", () => this.strip());
    new ResizeObserver(() => { if (this.image) redraw(); }).observe(this.box);
    for (const figure of this.planes) this.hands(figure);
  }

  hands(figure) {
    const name = figure.dataset.plane, plane = PLANES[name], canvas = figure.querySelector("canvas");
    const step = (by) => this.move(name, this.at[plane.axis] + by);
    figure.querySelector("input").addEventListener("input", (e) => this.move(name, Number(e.target.value)));
    let turned = 0;
    canvas.addEventListener("wheel", (e) => {
      e.preventDefault();
      // a wheel's notch is about 100 pixels or 3 lines, a touchpad sends many small ones
      turned += e.deltaMode ? e.deltaY * 20 : e.deltaY;
      const notches = Math.trunc(turned / 40);
      if (notches) { turned = 0; step(-Math.sign(notches)); }
    }, {passive: false});
    const point = (e) => {
      const area = canvas.getBoundingClientRect(), ratio = canvas.width / area.width, f = canvas.frame;
      const across = ((e.clientX - area.left) * ratio - f.x) / f.width, down = ((e.clientY - area.top) * ratio - f.y) / f.height;
      if (across < 0 || across >= 1 || down < 0 || down >= 1) return;
      const {shape} = this.data;
      this.at[plane.columns] = shape[plane.columns] - 1 - Math.floor(across * shape[plane.columns]);
      this.at[plane.rows] = shape[plane.rows] - 1 - Math.floor(down * shape[plane.rows]);
      this.last = name;
      this.draw();
    };
    canvas.addEventListener("click", point);
    canvas.addEventListener("pointermove", (e) => { if (e.buttons === 1 && e.pointerType === "mouse") point(e); });
    canvas.addEventListener("keydown", (e) => {
      const jumps = {ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 5, PageDown: -5, Home: -1e6, End: 1e6};
      const turns = {"[": -1, "]": 1}, hides = {t: "truth", p: "prediction"};
      if (e.ctrlKey || e.metaKey || e.altKey) return;
      if (e.key in jumps) step(jumps[e.key]);
      else if (e.key in turns) {
        const select = this.controls.init, count = select.options.length;
        select.selectedIndex = (select.selectedIndex + turns[e.key] + count) % count;
        this.prediction();
      } else if (e.key.toLowerCase() in hides) {
        const input = this.controls[hides[e.key.toLowerCase()]];
        input.checked = !input.checked;
        this.draw();
      } else return;
      e.preventDefault();
    });
  }
}

for (const box of document.querySelectorAll(".viewer")) box.viewer = new Viewer(box);
