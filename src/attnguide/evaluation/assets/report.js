
"use strict";
const ranges = document.querySelectorAll(".stage input");
const move = (range) => range.parentElement.style.setProperty("--cut", range.value + "%");
for (const range of ranges) {
  range.addEventListener("input", () => move(range));
  move(range);  // after a reload browsers restore where it was
}
document.getElementById("all")?.addEventListener("input", (event) => {
  for (const range of ranges) {
    range.value = event.target.value;
    move(range);
  }
});
