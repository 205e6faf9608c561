// What tests do in the page with its own modules: `helpers`, once this is evaluated.

globalThis.prepared = (async () => {
  const main = document.querySelector('script[type=module]').src;
  const { Growing } = await import(main.replace('main.js', 'markdown.js'));
  const { events: stream } = await import(main.replace('main.js', 'events.js'));

  // An element in which a text has grown, piece by piece.
  const drawn = (...texts) => {
    const element = document.createElement('div');
    const growing = new Growing(element);
    texts.forEach((text) => growing.show(text));
    growing.show(texts.at(-1), { whole: true });
    return element;
  };
  const withoutMaths = (element) => {
    element.querySelectorAll('.maths, .tex').forEach((each) => each.remove()); // which is drawn later
    return element.innerHTML;
  };
  const until = async (found) => {
    while (!found()) await new Promise((done) => setTimeout(done, 10));
  };

  globalThis.helpers = {
    markup: (texts) => texts.map((text) => drawn(text).firstElementChild.innerHTML.trim()),
    links: (text) => Array.from(drawn(text).querySelectorAll('a'), (link) => link.href),
    code: (text) => drawn(text).querySelector('code').textContent,
    dangers: (text) => drawn(text).querySelectorAll('math, [onclick]').length,

    // What comes of a stream in pieces of so many bytes.
    async events(text, size) {
      const bytes = new TextEncoder().encode(text);
      const pieces = Array.from({ length: Math.ceil(bytes.length / size) }, (_, at) =>
        bytes.slice(at * size, (at + 1) * size),
      );
      const found = [];
      const body = new ReadableStream({
        start(to) {
          pieces.forEach((piece) => to.enqueue(piece));
          to.close();
        },
      });
      for await (const data of stream(body)) found.push(data);
      return found;
    },

    // In pieces of seven characters, and as a whole.
    twice(text) {
      const ends = Array.from({ length: Math.ceil(text.length / 7) }, (_, at) => 7 * (at + 1));
      return [drawn(...ends.map((end) => text.slice(0, end))), drawn(text)].map(withoutMaths);
    },

    // Of each text, how many formulas stand in a line of their own.
    displayed: (texts) =>
      Promise.all(
        texts.map(async (text) => {
          const element = drawn(text);
          await until(() => element.querySelector('.katex'));
          return element.querySelectorAll('.katex-display').length;
        }),
      ),

    // How many elements were ever made for so many paragraphs that came one after the other.
    made(count) {
      const element = document.createElement('div');
      const growing = new Growing(element);
      const seen = new Set();
      let text = '';
      for (let at = 0; at < count; at += 1) {
        text += `Paragraph ${at}.\n\n`;
        growing.show(`${text}x`);
        for (const each of element.children) seen.add(each);
      }
      return seen.size;
    },

    // Whether anything reaches beyond the screen at its right.
    isTooWide() {
      const shown = document.querySelectorAll('main, main > *, .message, dialog');
      const beyond = (element) => element.getBoundingClientRect().right > innerWidth + 1;
      return document.documentElement.scrollWidth > innerWidth || Array.from(shown).some(beyond);
    },

    choose(selector, value) {
      const field = document.querySelector(selector);
      field.value = value;
      field.dispatchEvent(new Event(field.tagName === 'SELECT' ? 'change' : 'input'));
    },

    // How far the messages could still be scrolled down.
    belowThread() {
      const box = document.querySelector('.thread');
      return box.scrollHeight - box.scrollTop - box.clientHeight;
    },

    async kept(store) {
      const asked = (request) =>
        new Promise((done) => {
          request.onsuccess = () => done(request.result);
        });
      const database = await asked(indexedDB.open('ingle'));
      const found = await asked(database.transaction(store).objectStore(store).getAll());
      database.close();
      return found;
    },

    ask(content) {
      const body = JSON.stringify({ messages: [{ role: 'user', content }] });
      fetch('v1/chat/completions', { method: 'POST', headers: { 'Content-Type': 'application/json' }, body });
    },
  };
})();
