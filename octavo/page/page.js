"use strict";
const find = (name) => document.getElementById(name);
// a link to a row of a table opens the table
const reveal = () => {
  const row = location.hash && find(decodeURIComponent(location.hash.slice(1)));
  if (!row) return;
  const details = row.closest("details");
  if (details) details.open = true;
  row.scrollIntoView({ block: "center" });
};
window.addEventListener("hashchange", reveal);
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='#']");
  if (link && link.getAttribute("href") === location.hash) reveal();
});
reveal();
const pairs = [...document.querySelectorAll(".pair")];
if (pairs.length) {
  const stage = document.querySelector(".stage");
  const move = () => stage.style.setProperty("--at", find("slider").value + "%");
  const show = (pair) => {
    for (const other of pairs) other.setAttribute("aria-pressed", String(other === pair));
    const number = find("checkpoint") ? Number(find("checkpoint").value) : 1;
    const images = pair.querySelectorAll("img");
    for (const [image, chosen] of [[find("below"), images[0]], [find("above"), images[number]]]) {
      image.src = chosen.src;
      image.alt = chosen.alt;
    }
    if (find("checkpoint")) find("right").textContent = number;
    find("shown").textContent = pair.querySelector(".words").textContent;
    find("numbers").textContent = pair.querySelectorAll(".numbers")[number - 1].textContent;
  };
  find("slider").addEventListener("input", move);
  find("difference").addEventListener("change", (event) => stage.classList.toggle("difference", event.target.checked));
  stage.addEventListener("pointermove", (event) => {
    const box = stage.getBoundingClientRect();
    find("slider").value = (100 * (event.clientX - box.left)) / box.width;
    move();
  });
  for (const pair of pairs) {
    pair.addEventListener("click", () => {
      show(pair);
      find("viewer").scrollIntoView({ block: "nearest" });
    });
  }
  if (find("checkpoint")) {
    find("checkpoint").addEventListener("change", () => show(pairs.find((pair) => pair.ariaPressed === "true")));
  }
  move();
}
