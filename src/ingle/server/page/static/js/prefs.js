// Small settings, in localStorage. Where that is full or forbidden they last as long as the page.

const PREFIX = 'ingle.';
const fallback = new Map();

export function read(name, otherwise = null) {
  if (fallback.has(name)) return fallback.get(name);
  try {
    const text = localStorage.getItem(PREFIX + name);
    return text === null ? otherwise : JSON.parse(text);
  } catch {
    return otherwise;
  }
}

export function write(name, value) {
  try {
    if (value === null || value === undefined) localStorage.removeItem(PREFIX + name);
    else localStorage.setItem(PREFIX + name, JSON.stringify(value));
    fallback.delete(name);
  } catch {
    fallback.set(name, value);
  }
}

// The same for as long as the tab is open.
export function readOnce(name) {
  try {
    return sessionStorage.getItem(PREFIX + name);
  } catch {
    return fallback.get(`once.${name}`) ?? null;
  }
}

export function writeOnce(name, text) {
  try {
    if (text === null) sessionStorage.removeItem(PREFIX + name);
    else sessionStorage.setItem(PREFIX + name, text);
  } catch {
    fallback.set(`once.${name}`, text);
  }
}
