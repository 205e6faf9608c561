// Where CommonMark reads Chinese, Japanese and Korean otherwise than their writers mean it.

const CJK =
  /[\u1100-\u11ff\u2018-\u201d\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef]|[\ud840-\ud87f]/;
const STRONG = /^\*\*(?![\s*])((?:[^*\n\\`]|\\.|`[^`\n]*`|\*(?!\*))+?)(?<!\s)\*\*(?!\*)/;

// `**“词”**后` and `**注意：**正文` are bold, although the marks stand between a punctuation mark and a letter.
export const cjkStrong = {
  name: 'cjkStrong',
  level: 'inline',
  start: (source) => source.indexOf('**'),
  tokenizer(source) {
    const match = STRONG.exec(source);
    if (!match || !CJK.test(source.slice(0, match[0].length + 1))) return undefined;
    return { type: 'strong', raw: match[0], text: match[1], tokens: this.lexer.inlineTokens(match[1]) };
  },
};

// `5~10 and 3~4` strikes nothing out: that takes two tildes.
export function plainTilde(source) {
  const match = /^~~(?=\S)([^\n]*?\S)~~(?!~)/.exec(source);
  if (match) return { type: 'del', raw: match[0], text: match[1], tokens: this.lexer.inlineTokens(match[1]) };
  const tildes = /^~+/.exec(source);
  return tildes ? { type: 'text', raw: tildes[0], text: tildes[0], escaped: false } : undefined;
}

const URL = /^https?:\/\/[^\s<>"'`\\\u1100-\u11ff\u2018-\u201d\u2e80-\u9fff\uac00-\ud7af\uff00-\uffef]+/i;

// An address ends before `。` and before Chinese words.
export function soberUrl(source) {
  const match = URL.exec(source);
  if (!match) return false;
  let href = match[0].replace(/[.,;:!?*_~]+$/, '');
  while (href.endsWith(')') && href.split('(').length < href.split(')').length) href = href.slice(0, -1);
  return {
    type: 'link',
    raw: href,
    text: href,
    href,
    tokens: [{ type: 'text', raw: href, text: href, escaped: false }],
  };
}
