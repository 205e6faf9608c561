// What the page says, in the language of the browser unless somebody chose another.

import { read, write } from './prefs.js';
import en from './words/en.js';
import zh from './words/zh.js';

const WORDS = { en, zh };
export const LANGUAGES = { en: 'English', zh: '中文' };

let current = chosen();

function chosen() {
  const wanted = [read('language'), ...navigator.languages].filter(Boolean).map((tag) => tag.slice(0, 2).toLowerCase());
  return wanted.find((tag) => tag in WORDS) ?? 'en';
}

export function language() {
  return current;
}

export function locale() {
  return current === 'zh' ? 'zh-CN' : 'en';
}

export function setLanguage(name) {
  write('language', name);
  applyLanguage();
}

export function applyLanguage() {
  current = chosen();
  document.documentElement.lang = locale();
}

// The text of that name, with {name} replaced by values.
export function t(name, values = {}) {
  const text = WORDS[current][name] ?? en[name];
  if (text === undefined) throw new Error(`there is no text ${name}`);
  return text.replace(/\{(\w+)\}/g, (_, key) => values[key] ?? '');
}

export function number(value, digits = 0) {
  return value.toLocaleString(locale(), { maximumFractionDigits: digits, minimumFractionDigits: digits });
}

export function seconds(value) {
  if (value < 0.995) return `${number(value * 1000)} ms`;
  return `${number(value, value < 9.995 ? 2 : 1)} s`;
}

export function bytes(value) {
  const units = ['B', 'KB', 'MB', 'GB', 'TB'];
  const power = value > 0 ? Math.min(Math.floor(Math.log10(value) / 3), units.length - 1) : 0;
  return `${number(value / 1000 ** power, power > 2 ? 1 : 0)} ${units[power]}`;
}
