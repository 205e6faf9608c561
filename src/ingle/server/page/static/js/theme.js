// Dark or light: as the system has it, unless somebody chose.

import { read, write } from './prefs.js';

export const THEMES = ['auto', 'light', 'dark'];
const wantsDark = matchMedia('(prefers-color-scheme: dark)');
const listeners = new Set();

export function theme() {
  const chosen = read('theme', 'auto');
  return THEMES.includes(chosen) ? chosen : 'auto';
}

export function setTheme(name) {
  write('theme', name === 'auto' ? null : name);
  applyTheme();
}

export function applyTheme() {
  const chosen = theme();
  document.documentElement.dataset.theme = chosen === 'auto' ? (wantsDark.matches ? 'dark' : 'light') : chosen;
  for (const listener of listeners) listener();
}

export function onTheme(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

wantsDark.addEventListener('change', applyTheme);
