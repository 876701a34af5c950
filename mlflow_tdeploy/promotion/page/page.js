// Brings what has changed without a reload; without scripts the page reloads itself.
setInterval(async () => {
  try {
    const answer = await fetch(location.href);
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("main");
    if (answer.ok && fresh) document.querySelector("main").replaceWith(fresh);
  } catch {
    document.querySelector("#state").textContent = "the watcher does not answer";
    document.querySelector("#state").className = "bad";
  }
}, 2000);
