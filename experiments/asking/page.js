// Opens what an address leads to, and the questions that a choice of claims leaves.
const reveal = () => {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  for (let e = target; e; e = e.parentElement) if (e.localName === "details") e.open = true;
  if (target.localName === "tbody") target.querySelector("details").open = true;
  target.scrollIntoView();
};
const choose = () => {
  const chosen = [...document.querySelectorAll(".choices :checked")].map(one => one.value).join("");
  for (const question of document.querySelectorAll("details.question"))
    question.open = chosen === "" ? false : question.querySelector(`.claim${chosen}`) !== null;
};
document.querySelector(".choices").addEventListener("change", choose);
addEventListener("hashchange", reveal);
reveal();
