import {
  type DictionaryMatch,
  type L33tMatch,
  type Matcher,
  MatcherBaseClass,
  type MatchOptions,
  Options,
  type UserInputsOptions,
} from '@zxcvbn-ts/core';

/** A way to write a letter, of one UTF-16 unit: `(` for c, `|-|` for h. */
type Disguise = L33tMatch['subs'][number];
/** By the first UTF-16 unit of what is written. */
type Disguises = Pick<ReadonlyMap<number, readonly Disguise[]>, 'get'>;

/** A word in a text, from its UTF-16 unit `i` to `j`, both included; `subs`: its disguises, each once. */
type Hit = Pick<L33tMatch, 'i' | 'j' | 'matchedWord' | 'rank' | 'dictionaryName' | 'subs'>;

const NONE: never[] = [];
const UNDISGUISED: Disguises = new Map();

/** Those that zxcvbn knows. */
export const DISGUISES: Disguises = Map.groupBy(
  Object.entries<string[]>(new Options().l33tTable).flatMap(([letter, written]) =>
    written.map((substitution) => ({ letter, substitution })),
  ),
  ({ substitution }) => substitution.charCodeAt(0),
);

/**
 * The words of some dictionaries as one trie, in typed arrays, where the garbage collector has nothing to
 * mark. Nodes are numbered level by level from the root, 0: the children of a node are neighbours, and so are
 * the nodes near the root, which every search passes.
 */
export class Words<Name extends string> {
  readonly #names: readonly Name[];
  /** Of each node: the UTF-16 unit that leads to it. */
  readonly #units: Uint16Array;
  /** Of each node: its first child. Its last is the one before the first of the next node. */
  readonly #firstChild: Uint32Array;
  /** Of each node: the rank of its word in each dictionary, from 1, or 0 where it is none of its words. */
  readonly #ranks: Uint32Array;

  /** @param dictionaries by name: words in lower case, by rank; of a word given twice the last counts. */
  constructor(dictionaries: Readonly<Record<Name, readonly string[]>>) {
    this.#names = Object.keys(dictionaries) as Name[];
    const lists = this.#names.map((name) => dictionaries[name]);
    const words = lists.flat().sort();
    const mostNodes = words.reduce((sum, word) => sum + word.length, 1);
    const units = new Uint16Array(mostNodes);
    const firstChild = new Uint32Array(mostNodes + 1);
    /** Of each word: the node to which the levels so far lead. */
    const reached = new Uint32Array(words.length);
    let nodes = 1;
    let parents = 0;
    for (let depth = 0, before = 0; before < nodes; depth++) {
      before = nodes;
      words.forEach((word, index) => {
        if (word.length <= depth) return;
        const parent = reached[index] as number;
        const unit = word.charCodeAt(depth);
        if (parents <= parent || units[nodes - 1] !== unit) {
          while (parents <= parent) firstChild[parents++] = nodes;
          units[nodes++] = unit;
        }
        reached[index] = nodes - 1;
      });
    }
    this.#units = units.slice(0, nodes);
    this.#firstChild = firstChild.fill(nodes, parents).slice(0, nodes + 1);
    this.#ranks = new Uint32Array(nodes * lists.length);
    lists.forEach((list, dictionary) => {
      list.forEach((word, index) => {
        this.#ranks[this.#nodeOf(word) * lists.length + dictionary] = index + 1;
      });
    });
    this.#ranks.fill(0, 0, lists.length); // No text contains the empty word.
  }

  has(dictionary: Name, word: string): boolean {
    return this.#ranks[this.#nodeOf(word) * this.#names.length + this.#names.indexOf(dictionary)] !== 0;
  }

  /**
   * Every word in `text` (in lower case), whichever of its letters are disguised. It costs as much as there
   * are beginnings of words to be read in the text, however many ways there are to read the whole.
   */
  search(text: string, disguises = UNDISGUISED): Hit[] {
    const hits: Hit[] = [];
    const dictionaries = this.#names.length;
    const walk = (i: number, end: number, node: number, matchedWord: string, subs: Disguise[]) => {
      for (let dictionary = 0; dictionary < dictionaries; dictionary++) {
        const rank = this.#ranks[node * dictionaries + dictionary] as number;
        const dictionaryName = this.#names[dictionary] as Name;
        if (rank > 0) hits.push({ i, j: end - 1, matchedWord, rank, dictionaryName, subs });
      }
      if (end === text.length) return;
      const unit = text.charCodeAt(end);
      const plain = this.#child(node, unit);
      if (plain > 0) walk(i, end + 1, plain, matchedWord + text[end], subs);
      for (const disguise of disguises.get(unit) ?? NONE) {
        const { letter, substitution } = disguise;
        const child = text.startsWith(substitution, end) ? this.#child(node, letter.charCodeAt(0)) : 0;
        if (child === 0) continue;
        const used = subs.includes(disguise) ? subs : [...subs, disguise];
        walk(i, end + substitution.length, child, matchedWord + letter, used);
      }
    };
    for (let i = 0; i < text.length; i++) walk(i, i, 0, '', NONE);
    return hits;
  }

  /** 0 where no word begins like that. */
  #nodeOf(beginning: string): number {
    let node = 0;
    for (let at = 0; at < beginning.length && (at === 0 || node > 0); at++)
      node = this.#child(node, beginning.charCodeAt(at));
    return node;
  }

  /** 0 where there is none. */
  #child(node: number, unit: number): number {
    const end = this.#firstChild[node + 1] as number;
    for (let child = this.#firstChild[node] as number; child < end; child++)
      if (this.#units[child] === unit) return child;
    return 0;
  }
}

/** As long as the password, so that places are the same in both: `İ` alone has a longer lower case. */
const lowerCase = (password: string) => password.replaceAll('\u0130', 'i').toLowerCase();

/**
 * In place of zxcvbn's own of these names, which look up every substring, the last of them in each of a
 * limited number of readings of the password. The matches have the same pattern, by which zxcvbn scores them.
 */
export function wordMatchers(words: Words<string>): Record<string, Matcher> {
  const ofUsers = new WeakMap<UserInputsOptions, Words<string>>();

  function wordsOf(user: UserInputsOptions): Words<string> {
    const known = ofUsers.get(user);
    if (known) return known;
    const userInputs: string[] = []; // With gaps: of an input given twice, the first rank is nobody's.
    for (const [word, rank] of Object.entries(user.rankedDictionary)) userInputs[rank - 1] = word;
    const own = new Words({ userInputs });
    ofUsers.set(user, own);
    return own;
  }

  type Search = (text: string, disguises?: Disguises) => Hit[];
  const matcher = (
    find: (password: string, search: Search) => (Hit & Partial<DictionaryMatch>)[],
  ): Matcher => ({
    feedback: () => null,
    scoring: () => 0,
    Matching: class extends MatcherBaseClass {
      match({ password, userInputsOptions: user }: MatchOptions): DictionaryMatch[] {
        const tries = user ? [words, wordsOf(user)] : [words];
        const search: Search = (...what) => tries.flatMap((trie) => trie.search(...what));
        return find(password, search).map((hit) => ({
          pattern: 'dictionary',
          token: password.slice(hit.i, hit.j + 1),
          reversed: false,
          l33t: false,
          ...hit,
        }));
      }
    },
  });

  return {
    dictionary: matcher((password, search) => search(lowerCase(password))),
    dictionaryReverse: matcher((password, search) => {
      const last = password.length - 1;
      const hits = search(lowerCase(password.split('').reverse().join('')));
      return hits.map((hit) => ({ ...hit, i: last - hit.j, j: last - hit.i, reversed: true }));
    }),
    dictionaryL33t: matcher((password, search) =>
      search(lowerCase(password), DISGUISES)
        // Or any 4 would be the word a.
        .filter(({ i, j, subs }) => subs.length > 0 && j > i)
        .map((hit) => ({
          ...hit,
          l33t: true,
          subDisplay: hit.subs.map(({ letter, substitution }) => `${substitution} -> ${letter}`).join(', '),
        })),
    ),
  };
}
