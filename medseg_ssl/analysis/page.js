// The map of a page: a link per section, the one in sight marked.
const map = document.querySelector(".map");
const links = new Map();
for (const [place, heading] of [...document.querySelectorAll("main section > h2")].entries()) {
  const part = heading.parentElement, link = document.createElement("a");
  part.id = part.id || `part-${place}`;
  link.href = "#" + part.id;
  link.textContent = heading.textContent;
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
