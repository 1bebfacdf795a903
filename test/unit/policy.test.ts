import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { describe, test } from 'node:test';
import { dictionary } from '@zxcvbn-ts/language-common';
import { Refusal, type ViolationReason } from '../../src/password/errors.ts';
import { normalise, Policy, type PolicyRules, type PolicySubject } from '../../src/password/policy.ts';

const defaults: PolicyRules = {
  min_length: 8,
  max_length: 256,
  min_complexity: 3,
  reject_common: true,
  reject_user_info: true,
  reject_same_as_old: true,
  rejectWords: [],
};
/** Every rule off but for the lengths, which are as wide as they go. */
const lenient: PolicyRules = {
  min_length: 1,
  max_length: 1024,
  min_complexity: 0,
  reject_common: false,
  reject_user_info: false,
  reject_same_as_old: false,
  rejectWords: [],
};
const nobody: PolicySubject = { username: '', displayName: '', email: '', oldPassword: undefined };
const ada: PolicySubject = {
  username: 'ada.lovelace',
  displayName: 'Ada Byron-King  Lovelace',
  email: 'countess@analytical.example',
  oldPassword: undefined,
};

function refusalOf(rules: Partial<PolicyRules>, password: string, subject = nobody): Refusal | undefined {
  try {
    new Policy({ ...lenient, ...rules }).check(normalise(password), subject);
    return undefined;
  } catch (error) {
    assert.ok(error instanceof Refusal);
    assert.equal(error.reason, 'PASSWORD_POLICY');
    return error;
  }
}

const broken = (rules: Partial<PolicyRules>, password: string, subject = nobody): ViolationReason[] =>
  (refusalOf(rules, password, subject)?.details.violations ?? []).map(({ reason }) => reason);

describe('length', () => {
  const rules = { min_length: 8, max_length: 64 };

  for (const [what, character] of [
    ['ASCII letters', 'x'],
    ['letters of two bytes', 'é'],
    ['emoji of two UTF-16 units', '\u{1F511}'],
    ['combining marks that compose', 'e\u0301'],
  ]) {
    test(`is counted in code points of the normal form: ${what}`, () => {
      const of = (length: number) => broken(rules, (character as string).repeat(length));
      assert.deepEqual(of(7), ['TOO_SHORT']);
      assert.deepEqual(of(8), []);
      assert.deepEqual(of(64), []);
      assert.deepEqual(of(65), ['TOO_LONG']);
    });
  }

  test('combining marks that have no composed form count each', () => {
    assert.deepEqual(broken(rules, 'q\u0301'.repeat(4)), []);
    assert.deepEqual(broken(rules, 'q\u0301'.repeat(3)), ['TOO_SHORT']);
  });

  test('an emoji of several code points counts each of them', () => {
    const family = '\u{1F468}\u200D\u{1F469}\u200D\u{1F467}';
    assert.deepEqual(broken({ min_length: 6 }, family), ['TOO_SHORT']);
    assert.deepEqual(broken({ min_length: 5 }, family), []);
  });

  test('64 characters of any kind are permitted by default', () => {
    const random = randomBytes(64);
    assert.deepEqual(broken(defaults, random.toString('base64').slice(0, 64)), []);
    const cyrillic = [...random].map((byte) => String.fromCodePoint(0x430 + (byte % 32))).join('');
    assert.deepEqual(broken(defaults, cyrillic), []);
  });

  test('a password of 1 MiB is refused without being scored', () => {
    const giant = 'correct horse '.repeat(75_000);
    const start = performance.now();
    assert.deepEqual(broken({ ...defaults, rejectWords: ['zzz'] }, giant, ada), ['TOO_LONG']);
    const tookMs = performance.now() - start;
    assert.ok(tookMs < 1000, `took ${tookMs} ms`);
  });

  test('the longest password that is taken is scored in bounded time', () => {
    for (const unit of ['aA1!', 'password', '\u{1F511}x', 'qwertyuiop', '20240101']) {
      const start = performance.now();
      broken({ ...defaults, max_length: 1024 }, unit.repeat(1024).slice(0, 1024), ada);
      const tookMs = performance.now() - start;
      assert.ok(tookMs < 2000, `${unit} took ${tookMs} ms`);
    }
  });
});

describe('guessing', () => {
  test('no composition rules: a thousand strong random strings of any alphabet pass', () => {
    const alphabets: ((byte: number) => string)[] = [
      (byte) => String.fromCodePoint(0x61 + (byte % 26)),
      (byte) => String.fromCodePoint(0x41 + (byte % 26)),
      (byte) => String.fromCodePoint(0x21 + (byte % 94)),
      (byte) => String.fromCodePoint(0x430 + (byte % 32)),
      (byte) => String.fromCodePoint(0x1f300 + byte),
    ];
    for (let i = 0; i < 1000; i++) {
      const letter = alphabets[i % alphabets.length] as (byte: number) => string;
      const password = [...randomBytes(16)].map(letter).join('');
      assert.deepEqual(broken(defaults, password), [], password);
    }
  });

  test('a password is too weak under the configured score, and 0 asks for none', () => {
    assert.deepEqual(broken({ min_complexity: 0 }, 'aaaaaaaa'), []);
    assert.deepEqual(broken({ min_complexity: 3 }, 'aaaaaaaa'), ['TOO_WEAK']);
    assert.deepEqual(broken({ min_complexity: 4 }, 'correct horse battery staple'), []);
    const [weakest, ...others] = [1, 2, 3, 4].map(
      (min_complexity) => broken({ min_complexity }, 'hgyt76').length,
    );
    assert.equal(weakest, 0);
    assert.ok(others.includes(1));
  });

  test('a weak beginning does not condemn a strong whole, nor a long whole excuse a weak one', () => {
    assert.deepEqual(broken({ min_complexity: 3 }, `${'a'.repeat(30)}kV9#tq2Lm!x`), []);
    assert.deepEqual(broken({ min_complexity: 3 }, 'a'.repeat(250)), ['TOO_WEAK']);
  });

  test('what many people use stays weak however many of its letters are disguised', () => {
    for (const password of ['P4$$w0rd', '007j@m3s!', '|)onn@123!', '1m()//ta//a!', '1ar7h|_|r!'])
      assert.deepEqual(broken({ min_complexity: 3 }, password), ['TOO_WEAK'], password);
  });

  test('what belongs to the user makes a password weaker', () => {
    assert.deepEqual(broken({ min_complexity: 3 }, 'ada.lovelacex', { ...ada, displayName: '', email: '' }), [
      'TOO_WEAK',
    ]);
  });
});

describe('lists', () => {
  test('every one of the common passwords is refused, in any case', () => {
    const list = dictionary['passwords-common'].map(String);
    assert.ok(list.length > 10_000);
    const policy = new Policy({ ...lenient, reject_common: true });
    for (const password of list) {
      for (const variant of [password, password.toUpperCase()]) {
        assert.throws(
          () => policy.check(normalise(variant), nobody),
          (error: Refusal) => error.details.violations?.[0]?.reason === 'COMMON',
          variant,
        );
      }
    }
  });

  test('a common password inside a longer one is not COMMON', () => {
    assert.deepEqual(broken({ reject_common: true }, 'password'), ['COMMON']);
    assert.deepEqual(broken({ reject_common: true }, 'password-of-mine'), []);
    assert.deepEqual(broken({}, 'password'), []);
  });

  test('words of the reject list are found anywhere, in any case and any normal form', () => {
    const rules = { rejectWords: ['Acme', 'ZU\u0308RICH', 'straße', '\u{10400}'] };
    for (const password of [
      'acme',
      'myACMEpassword',
      'xxzürich',
      'XXZu\u0308rich',
      'Die STRAßE',
      'a\u{10428}b',
    ]) {
      assert.deepEqual(broken(rules, password), ['REJECTED'], password);
    }
    for (const password of ['ac-me', 'zurich', 'acm'])
      assert.deepEqual(broken(rules, password), [], password);
  });
});

describe('the user', () => {
  const rules = { reject_user_info: true };

  test('the own name or address inside a password is refused, in any case', () => {
    for (const password of [
      'xADA.LOVELACEx',
      'my Lovelace 99',
      'byron-KING!',
      '1countess1',
      'COUNTESS@ANALYTICAL.EXAMPLE',
      'xx Ada Byron-King  Lovelace xx',
    ]) {
      assert.deepEqual(broken(rules, password, ada), ['CONTAINS_USER_INFO'], password);
    }
    assert.deepEqual(broken({}, 'ada.lovelace', ada), []);
  });

  test('parts of three characters and the domain of the address are no user information', () => {
    for (const password of ['canada dry', 'an analytical mind', 'example given']) {
      assert.deepEqual(broken(rules, password, ada), [], password);
    }
  });

  test('a name is found in any normal form', () => {
    const subject = { ...nobody, displayName: 'Zoe\u0308 Ka\u0308fer' };
    assert.deepEqual(broken(rules, 'xkäferx', subject), ['CONTAINS_USER_INFO']);
    assert.deepEqual(broken(rules, 'xKA\u0308FERx', subject), ['CONTAINS_USER_INFO']);
  });

  test('a user without name and address is no reason to refuse anything', () => {
    assert.deepEqual(broken(rules, 'anything at all', nobody), []);
    assert.deepEqual(broken(rules, 'anything @ all', { ...nobody, email: '@', displayName: '  ' }), []);
  });
});

describe('the old password', () => {
  const subject = { ...nobody, oldPassword: normalise('Zu\u0308rich am See') };

  test('the same again is refused in whatever normal form it comes', () => {
    assert.deepEqual(broken({ reject_same_as_old: true }, 'Zürich am See', subject), ['SAME_AS_OLD']);
    assert.deepEqual(broken({}, 'Zürich am See', subject), []);
  });

  test('another case, another blank, another last character are other passwords', () => {
    for (const password of ['zürich am See', 'Zürich am See ', 'Zürich am Seé', 'Zürich am See\0']) {
      assert.deepEqual(broken({ reject_same_as_old: true }, password, subject), [], password);
    }
  });
});

describe('the answer', () => {
  test('tells every broken rule at once, in the order of the enum, each with its limit and its code', () => {
    const subject = { ...nobody, username: 'love', oldPassword: 'love' };
    const refusal = refusalOf({ ...defaults, rejectWords: ['ov'] }, 'love', subject);
    const reasons = refusal?.details.violations?.map(({ reason }) => reason);
    assert.deepEqual(reasons, [
      'TOO_SHORT',
      'TOO_WEAK',
      'REJECTED',
      'COMMON',
      'CONTAINS_USER_INFO',
      'SAME_AS_OLD',
    ]);
    assert.deepEqual(refusal?.details.metadata, { min_length: '8', min_complexity: '3' });
    assert.deepEqual(refusal?.details.subStatus?.toSorted(), ['E003001', 'E003002', 'E003008']);
    for (const { field } of refusal?.details.violations ?? []) assert.equal(field, 'new_password');
  });

  test('tells the greatest length where that is broken', () => {
    const refusal = refusalOf({ max_length: 64 }, 'x'.repeat(65));
    assert.deepEqual(refusal?.details.metadata, { max_length: '64' });
    assert.deepEqual(refusal?.details.subStatus, ['E003003']);
    assert.match(refusal?.details.violations?.[0]?.description ?? '', /at most 64/);
  });

  for (const [reason, rules, password, code] of [
    ['TOO_SHORT', { min_length: 2 }, 'x', 'E003002'],
    ['TOO_WEAK', { min_complexity: 4 }, 'xxxx', 'E003008'],
    ['REJECTED', { rejectWords: ['x'] }, 'x', 'E003001'],
    ['COMMON', { reject_common: true }, '123456', 'E003001'],
    ['CONTAINS_USER_INFO', { reject_user_info: true }, 'ada.lovelace', 'E003001'],
    ['SAME_AS_OLD', { reject_same_as_old: true }, 'the old one', 'E003001'],
  ] as const) {
    test(`has the code ${code} for ${reason}`, () => {
      const refusal = refusalOf(rules, password, { ...ada, oldPassword: 'the old one' });
      assert.deepEqual(
        refusal?.details.violations?.map((each) => each.reason),
        [reason],
      );
      assert.deepEqual(refusal?.details.subStatus, [code]);
    });
  }

  test('never repeats the password, the old one, or a word of the reject list', () => {
    const refusal = refusalOf({ ...defaults, rejectWords: ['canary'] }, 'CaNaRy1', {
      ...nobody,
      oldPassword: 'CaNaRy1',
    });
    assert.doesNotMatch(JSON.stringify({ ...refusal, message: refusal?.message }), /canary/i);
  });
});
