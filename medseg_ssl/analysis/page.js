// The map of a page: a link per section, or per comparison where there are several; the one in sight is marked.
const map = document.querySelector(".map");
const tops = [...document.querySelectorAll("main > h1")].slice(1);
const parts = tops.length > 1 ? tops : [...document.querySelectorAll("main section")];
const links = new Map();
for (const [place, part] of parts.entries()) {
  const link = document.createElement("a");
  part.id = part.id || `part-${place}`;
  link.href = "#" + part.id;
  link.textContent = (part.querySelector("h2") || part).textContent;
  links.set(part, link);
  map.append(link);
}
const seen = new Set();
const watch = new IntersectionObserver((changes) => {
  for (const change of changes) { if (change.isIntersecting) seen.add(change.target); else seen.delete(change.target); }
  const first = [...links.keys()].find((part) => seen.has(part));
  for (const [part, link] of links) link.setAttribute("aria-current", part === first);
}, {rootMargin: "-60px 0px -60% 0px"});
for (const part of links.keys()) watch.observe(part);
