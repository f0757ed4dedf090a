"use strict";
const find = (name) => document.getElementById(name);
const stage = document.querySelector(".stage");
const pairs = [...document.querySelectorAll(".pair")];
const move = () => stage.style.setProperty("--at", find("slider").value + "%");
find("slider").addEventListener("input", move);
find("difference").addEventListener("change", (event) => stage.classList.toggle("difference", event.target.checked));
stage.addEventListener("pointermove", (event) => {
  const box = stage.getBoundingClientRect();
  find("slider").value = (100 * (event.clientX - box.left)) / box.width;
  move();
});
for (const pair of pairs) {
  pair.addEventListener("click", () => {
    for (const other of pairs) other.setAttribute("aria-pressed", String(other === pair));
    const [exact, quantized] = pair.querySelectorAll("img");
    for (const [image, chosen] of [[find("below"), exact], [find("above"), quantized]]) {
      image.src = chosen.src;
      image.alt = chosen.alt;
    }
    find("shown").textContent = pair.querySelector(".words").textContent;
    find("numbers").textContent = pair.querySelector(".numbers").textContent;
    find("viewer").scrollIntoView({ block: "nearest" });
  });
}
move();
