import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { type L33tMatch, Options, type UserInputsOptions, ZxcvbnFactory } from '@zxcvbn-ts/core';
import { adjacencyGraphs, dictionary } from '@zxcvbn-ts/language-common';
import { DISGUISES, Words, wordMatchers } from '../../src/password/words.ts';
import { Random } from '../fault/random.ts';

type MatcherName = 'dictionary' | 'dictionaryReverse' | 'dictionaryL33t' | 'wordSequence';

/** What the library keeps to itself. */
interface Inside {
  matching: { matchers: Record<MatcherName, { match(what: object): L33tMatch[] }> };
}

const words = new Words(dictionary);
const graphs = adjacencyGraphs;
const library = new ZxcvbnFactory({ dictionary, graphs });
const ours = new ZxcvbnFactory({ graphs, l33tMaxSubstitutions: 0 }, wordMatchers(words));

const userOf = (inputs: string[]) => new Options().getUserInputsOptions(inputs);

function matches(
  of: ZxcvbnFactory,
  name: MatcherName,
  password: string,
  user?: UserInputsOptions,
): L33tMatch[] {
  const { matching } = of as unknown as Inside;
  return matching.matchers[name].match({ password, userInputsOptions: user });
}

/** A match as text. The library's plain matches come without `subs`, ours with none. */
const textOf = ({ subs = [], ...match }: Partial<L33tMatch>) =>
  JSON.stringify(Object.entries({ ...match, subs }).sort());
const textsOf = (list: readonly L33tMatch[]) => list.map(textOf).sort();

const random = new Random(20_240_917);
const list = Object.values(dictionary).flat();
const table = Object.entries<string[]>(new Options().l33tTable);
const writtenAs = new Map(table);

const word = () => random.pick(list);
const number = () => String(random.between(0, 9999));
const anyCase = (text: string) =>
  [...text].map((letter) => (random.chance(0.3) ? letter.toUpperCase() : letter)).join('');
const some = (length: number, character: () => string) => Array.from({ length }, character).join('');
const printable = () => String.fromCharCode(random.between(0x20, 0x7e));
const disguised = (text: string) =>
  [...text]
    .map((letter) => (random.chance(0.3) ? random.pick(writtenAs.get(letter) ?? [letter]) : letter))
    .join('');
const ODD = [...'aAsSßẞΣςσ\u0130\u0131Kkéñ\u0301\u200d\u{1F511}\u{10400}\u{10428}\u0000', '\ud801', '\udc28'];
/** All but `İ`: see its own test. */
const odd = () => random.pick(ODD.filter((character) => character !== '\u0130'));

const KINDS: (() => string)[] = [
  word,
  () => word() + word(),
  () => word() + number() + word(),
  () => [...word()].reverse().join('') + number(),
  () => anyCase(word() + random.pick(['', ' ', '-', '!']) + word()),
  () => disguised(word()),
  () => some(random.between(0, 24), printable),
  () => some(random.between(1, 12), odd) + word() + some(random.between(0, 3), odd),
  () => some(random.between(1, 3), word).repeat(random.between(2, 4)),
];
const USER_INPUTS = [
  'user1234',
  'User Number',
  '',
  'o',
  'Number',
  'user1234',
  'password',
  'straße ΑΣ',
  '\u{10400}a\u{1F511}',
  '\ud801',
  '12',
  'hasOwnProperty',
];

describe('words as they are, forwards and backwards', () => {
  const user = userOf(USER_INPUTS);

  for (const name of ['dictionary', 'dictionaryReverse'] as const) {
    test(`${name} finds just what the library's finds`, () => {
      for (let n = 0; n < 3000; n++) {
        const own = n % 3 === 0 ? random.pick(USER_INPUTS) : '';
        const password = (random.pick(KINDS)() + anyCase(own)).slice(0, 60);
        const known = n % 2 === 0 ? user : undefined;
        assert.deepEqual(
          textsOf(matches(ours, name, password, known)),
          textsOf(matches(library, name, password, known)),
          JSON.stringify(password),
        );
      }
    });
  }

  test('the library finds no sequences of words in these dictionaries that could be missed now', () => {
    for (const password of ['onetwothree', 'monday-tuesday', 'red orange yellow', '0n3tw0thr33'])
      for (const zxcvbn of [library, ours]) assert.deepEqual(matches(zxcvbn, 'wordSequence', password), []);
  });
});

/**
 * The library slices the lower-case password at the places of the password itself, which are others after an
 * `İ`. Ours takes it for an i.
 */
describe('lower case', () => {
  test('an İ moves no match from its place', () => {
    const found = (name: MatcherName, password: string) =>
      matches(ours, name, password).map(({ i, token, matchedWord }) => `${i}: ${token} for ${matchedWord}`);
    const forwards = found('dictionary', '\u0130stanbulmonkey');
    assert.ok(forwards.includes('0: \u0130stanbul for istanbul'));
    assert.ok(forwards.includes('8: monkey for monkey'));
    assert.ok(found('dictionaryReverse', '1lubnats\u0130').includes('1: lubnats\u0130 for istanbul'));
    assert.ok(found('dictionaryL33t', '1\u0130st@nbul').includes('1: \u0130st@nbul for istanbul'));
  });

  test('İ alone has a lower case of another length', () => {
    for (let point = 0; point <= 0x10ffff; point++) {
      const character = String.fromCodePoint(point);
      if (character.toLowerCase().length !== character.length) assert.equal(character, '\u0130');
    }
  });
});

describe('disguised words', () => {
  const samples = Array.from({ length: 900 }, (_, n) =>
    (disguised(word()) + (n % 3 === 0 ? disguised(word()) : '') + (n % 4 === 0 ? number() : '')).slice(0, 24),
  ).map((sample, n) => (n % 2 === 0 ? anyCase(sample) : sample));

  test('whatever the library finds in its readings is found, with the same substitutions, and once', () => {
    let found = 0;
    for (const password of samples) {
      const user = userOf([word(), 'l33t', 'a', 'b.ooo']);
      const texts = textsOf(matches(ours, 'dictionaryL33t', password, user));
      assert.equal(new Set(texts).size, texts.length, password);
      for (const match of matches(library, 'dictionaryL33t', password, user).map(textOf)) {
        assert.ok(texts.includes(match), `${password}: ${match}`);
        found++;
      }
    }
    assert.ok(found > 1000);
  });

  test('a single character is no disguised word', () => {
    const found = matches(ours, 'dictionaryL33t', '4()', userOf(['a', 'o']));
    assert.deepEqual(
      found.map(({ token, matchedWord }) => `${token} for ${matchedWord}`),
      ['() for o'],
    );
  });

  test('every match is a word, and its disguises are in its token', () => {
    for (const password of samples) {
      for (const match of matches(ours, 'dictionaryL33t', password)) {
        const { i, j, token, matchedWord, rank, dictionaryName, subs } = match;
        assert.equal(token, password.slice(i, j + 1));
        assert.ok(subs.length > 0);
        assert.equal(dictionary[dictionaryName as keyof typeof dictionary][rank - 1], matchedWord);
        for (const { substitution, letter } of subs) {
          assert.ok(token.toLowerCase().includes(substitution) && matchedWord.includes(letter));
        }
      }
    }
  });

  test('every letter of a word may be disguised, in each way that the library knows', () => {
    for (const [letter, ways] of table) {
      const target = list.find((each) => each.includes(letter)) as string;
      for (const way of ways) {
        const password = `x${target.replaceAll(letter, way)}`;
        const hit = matches(ours, 'dictionaryL33t', password).find((each) => each.matchedWord === target);
        assert.equal(hit?.token, password.slice(1));
        assert.equal(hit?.subDisplay, `${way} -> ${letter}`);
      }
    }
  });

  /**
   * More words found are more ways to guess. The library's search for the best of them is not exact, so there
   * may be exceptions; of 12,000 passwords made like these there was none.
   */
  test('no password takes more guesses than the library says', () => {
    for (let n = 0; n < 800; n++) {
      const password = n % 2 === 0 ? (samples[n] as string) : random.pick(KINDS)();
      const [by, than] = [ours, library].map((zxcvbn) => zxcvbn.check(password, ['user1234']).guesses);
      assert.ok((by as number) <= (than as number), `${password}: ${by} > ${than}`);
    }
  });
});

describe('cost', () => {
  /** Of a text: nodes of the trie at which a search has looked for the next character. */
  function visits(text: string): number {
    let count = 0;
    const get: typeof DISGUISES.get = (unit) => {
      count++;
      return DISGUISES.get(unit);
    };
    words.search(text, { get });
    return count;
  }

  test('does not grow with the number of ways to read a text', () => {
    /** For each character of the text; the worst that a long search for bad texts has found is 57. */
    const MOST_VISITS = 100;
    const ambiguous = table.flatMap(([, ways]) => ways);
    const units = '1 | ! < () 1!| 1|!7 |< 2 7 6 9 # (< 1l!|<|) |_|'.split(' ');
    for (let n = 0; n < 200; n++) units.push(some(6, () => random.pick(ambiguous)));
    for (const unit of units) {
      for (const length of [24, 100, 200]) {
        const text = unit.repeat(length).slice(0, length);
        assert.ok(visits(text) <= MOST_VISITS * length, `${unit}: ${visits(text)} for ${length}`);
      }
    }
  });
});

describe('a list', () => {
  test('has its words, and neither their beginnings nor the words of another list', () => {
    const colours = new Words({ warm: ['red', 'redder'], cold: ['blue'] });
    assert.deepEqual(
      ['red', 'redder'].filter((each) => colours.has('warm', each)),
      ['red', 'redder'],
    );
    for (const each of ['', 'r', 're', 'redd', 'reddest', 'ed', 'xred', 'blue', 'x'])
      assert.equal(colours.has('warm', each), false, each);
    assert.equal(colours.has('cold', 'blue'), true);
  });

  test('may be empty', () => {
    const none = new Words({ nothing: [], emptiness: [''] });
    assert.equal(none.has('emptiness', ''), false);
    assert.deepEqual(none.search('anything'), []);
  });
});
