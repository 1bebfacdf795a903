import { ZxcvbnFactory } from '@zxcvbn-ts/core';
import { adjacencyGraphs, dictionary } from '@zxcvbn-ts/language-common';
import { Refusal, type Violation, type ViolationReason } from './errors.ts';
import { Words, wordMatchers } from './words.ts';

/** The rules for new passwords; the keys of the configuration's section `policy`, and the words read from its file. */
export interface PolicyRules {
  /** Code points. */
  readonly min_length: number;
  /** Code points. */
  readonly max_length: number;
  /** zxcvbn score, 0 to 4; 0 switches the rule off. */
  readonly min_complexity: number;
  readonly reject_common: boolean;
  readonly reject_user_info: boolean;
  readonly reject_same_as_old: boolean;
  /** Case-insensitive substrings that no password may contain. */
  readonly rejectWords: readonly string[];
}

/** What the policy may look at beside the new password itself. */
export interface PolicySubject {
  readonly username: string;
  readonly displayName: string;
  readonly email: string;
  /** Normalised; undefined where none was sent. */
  readonly oldPassword: string | undefined;
}

/** zxcvbn's cost explodes with length: a long password is scored by its beginning. In code points. */
const SCORED_LENGTH = 100;
/**
 * Most long passwords have earned the best score by here, at a fraction of the cost; and no word of the dictionaries is
 * longer, so that none is cut in two and taken for something better. In code points.
 */
const FIRST_SCORED_LENGTH = 24;
/** Shorter names (`jo`, `de`) turn up inside of good passwords by chance. In code points. */
const MIN_USER_INFO_LENGTH = 4;

const words = new Words(dictionary);
const zxcvbn = new ZxcvbnFactory(
  // No readings of disguised letters: only the search for sequences of words needs them, and it has none here.
  { graphs: adjacencyGraphs, l33tMaxSubstitutions: 0 },
  wordMatchers(words),
);

/** How Rekey takes every password: Unicode NFC, and nothing else done to it (NIST SP 800-63B-4, 3.1.1.2). */
export const normalise = (password: string) => password.normalize('NFC');

/** Whether a password may be set. Built once for a configuration. */
export class Policy {
  readonly #rules: PolicyRules;
  readonly #rejectWords: readonly string[];

  constructor(rules: PolicyRules) {
    this.#rules = rules;
    this.#rejectWords = rules.rejectWords.map((word) => normalise(word).toLowerCase());
  }

  /** @throws Refusal PASSWORD_POLICY with a violation for each broken rule, if `password` (normalised) breaks any. */
  check(password: string, subject: PolicySubject): void {
    const broken = this.#brokenRules(password, subject);
    if (broken.length === 0) return;
    throw new Refusal('PASSWORD_POLICY', {
      violations: broken.map((reason) => ({
        field: 'new_password',
        reason,
        description: this.#describe(reason),
      })),
      metadata: this.#limits(broken),
      subStatus: [...new Set(broken.map((reason) => SUB_STATUS[reason] ?? 'E003001'))],
    });
  }

  #brokenRules(password: string, subject: PolicySubject): ViolationReason[] {
    const { min_length, max_length, min_complexity, reject_common, reject_user_info, reject_same_as_old } =
      this.#rules;
    // A string of n UTF-16 units has at least n/2 code points: the giant ones are never taken apart.
    const length = password.length > 2 * max_length ? Number.POSITIVE_INFINITY : [...password].length;
    if (length > max_length) return ['TOO_LONG'];
    const folded = password.toLowerCase();
    const broken: ViolationReason[] = [];
    if (length < min_length) broken.push('TOO_SHORT');
    if (min_complexity > 0 && !isComplex(password, min_complexity, subject)) broken.push('TOO_WEAK');
    if (this.#rejectWords.some((word) => folded.includes(word))) broken.push('REJECTED');
    if (reject_common && words.has('passwords-common', folded)) broken.push('COMMON');
    if (reject_user_info && containsUserInfo(folded, subject)) broken.push('CONTAINS_USER_INFO');
    if (reject_same_as_old && password === subject.oldPassword) broken.push('SAME_AS_OLD');
    return broken;
  }

  #describe(reason: ViolationReason): string {
    switch (reason) {
      case 'TOO_SHORT':
        return `must have at least ${this.#rules.min_length} characters`;
      case 'TOO_LONG':
        return `must have at most ${this.#rules.max_length} characters`;
      case 'TOO_WEAK':
        return 'is too easy to guess; longer, or several unrelated words, would do';
      case 'REJECTED':
        return 'contains a word that must not be in a password here';
      case 'COMMON':
        return 'is one of the passwords that many people use';
      case 'CONTAINS_USER_INFO':
        return "contains the user's own name or e-mail address";
      default:
        return 'equals the old password';
    }
  }

  #limits(broken: readonly ViolationReason[]): Record<string, string> {
    return {
      ...(broken.includes('TOO_SHORT') ? { min_length: String(this.#rules.min_length) } : {}),
      ...(broken.includes('TOO_LONG') ? { max_length: String(this.#rules.max_length) } : {}),
      ...(broken.includes('TOO_WEAK') ? { min_complexity: String(this.#rules.min_complexity) } : {}),
    };
  }
}

const SUB_STATUS: Partial<Record<ViolationReason, string>> = {
  TOO_SHORT: 'E003002',
  TOO_LONG: 'E003003',
  TOO_WEAK: 'E003008',
};

/** A beginning that is hard to guess makes the whole hard to guess, so the short look often spares the long one. */
function isComplex(password: string, minScore: number, subject: PolicySubject): boolean {
  const points = [...password];
  const userInputs = userInfo(subject);
  return [FIRST_SCORED_LENGTH, SCORED_LENGTH].some(
    (length, look) =>
      (look === 0 || points.length > FIRST_SCORED_LENGTH) &&
      zxcvbn.check(points.slice(0, length).join(''), userInputs).score >= minScore,
  );
}

function containsUserInfo(foldedPassword: string, subject: PolicySubject): boolean {
  return userInfo(subject).some(
    (info) => [...info].length >= MIN_USER_INFO_LENGTH && foldedPassword.includes(info.toLowerCase()),
  );
}

function userInfo({ username, displayName, email }: PolicySubject): string[] {
  const [mailbox = ''] = email.split('@');
  return [username, displayName, ...displayName.split(/\s+/), email, mailbox]
    .filter((info) => info !== '')
    .map(normalise);
}

/** A violation of a field that must be there. */
export const required = (field: string, description = 'is required'): Violation => ({
  field,
  reason: 'REQUIRED',
  description,
});
