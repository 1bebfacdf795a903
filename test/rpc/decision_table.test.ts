import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { after, before, describe, it } from 'node:test';
import {
  type Answer,
  type ChangeMessage,
  eventually,
  type Metadata,
  type Service,
  startService,
  strongPassword,
  type TestUser,
  type UserOptions,
} from '../support/service.ts';

/** Who is there before a row's call is made. */
interface Cast {
  me: TestUser;
  /** Somebody else, a regular user. */
  other: TestUser;
  cid: string;
}

interface Row {
  /** The number in the decision table; 0: allowed. */
  row: number;
  /** Ends the sentence that begins with the row's outcome. */
  when: string;
  me?: UserOptions;
  other?: UserOptions;
  /** What has to happen before. */
  first?: (service: Service, cast: Cast) => Promise<unknown>;
  /** Over `{ ust, app: 'CRM', cid }`; undefined leaves a key out. */
  metadata?: (cast: Cast) => Record<string, string | undefined>;
  /** Over an own change from the right old password to a good new one; undefined leaves a field out. */
  message?: (cast: Cast) => { [K in keyof ChangeMessage]?: ChangeMessage[K] | undefined };
  code: string;
  reason?: string;
  subStatus?: string;
  violations?: string[];
  /** Of ErrorInfo, beside cid and sub_status. */
  limits?: Record<string, string>;
  hasRetry?: boolean;
  /** Whose hash is another afterwards. */
  changes?: 'me' | 'other';
  /** The outcome and reason of the one audit record; absent: there is none. */
  audited?: string;
  /** The cid was not fit to be echoed. */
  newCid?: boolean;
}

const regular: UserOptions = {};
const superUser: UserOptions = { isSuperUser: true };

const malformed = (
  when: string,
  violations: string[],
  rest: Pick<Row, 'metadata' | 'message' | 'newCid' | 'me'>,
): Row => ({
  row: 1,
  when,
  code: 'INVALID_ARGUMENT',
  reason: 'INVALID_REQUEST',
  violations,
  subStatus: violations.every((violation) => violation.endsWith('REQUIRED'))
    ? 'E008003'
    : violations.some((violation) => violation.endsWith('REQUIRED'))
      ? 'E008002,E008003'
      : 'E008002',
  ...rest,
});

const noSession = (when: string, rest: Pick<Row, 'metadata' | 'first' | 'me'>): Row => ({
  row: 2,
  when,
  code: 'UNAUTHENTICATED',
  reason: 'SESSION_INVALID',
  subStatus: 'E007001',
  ...rest,
});

const denied = (row: number, reason: string, subStatus: string, when: string, rest: Partial<Row>): Row => ({
  row,
  when,
  code: 'PERMISSION_DENIED',
  reason,
  subStatus,
  audited: `refused ${reason}`,
  ...rest,
});

const policy = (
  when: string,
  newPassword: string | ((cast: Cast) => string),
  violations: string[],
  subStatus: string,
  limits: Record<string, string>,
  rest: Partial<Row> = {},
): Row => ({
  row: 9,
  when,
  message: (cast) => ({ newPassword: typeof newPassword === 'string' ? newPassword : newPassword(cast) }),
  code: 'INVALID_ARGUMENT',
  reason: 'PASSWORD_POLICY',
  violations: violations.map((violation) => `new_password ${violation}`),
  subStatus,
  limits,
  audited: 'refused PASSWORD_POLICY',
  ...rest,
});

const LONGEST = { max_length: '256' };
const SHORTEST = { min_length: '8' };
const SIMPLEST = { min_complexity: '3' };

const rows: Row[] = [
  // ---- what is allowed
  { row: 0, when: 'a regular user changes the own password', code: 'OK', changes: 'me', audited: 'ok ' },
  {
    row: 0,
    when: 'a regular user names the own user_id',
    message: ({ me }) => ({ userId: me.userId }),
    code: 'OK',
    changes: 'me',
    audited: 'ok ',
  },
  {
    row: 0,
    when: 'a user whose password has expired changes it',
    me: { hasExpired: true },
    code: 'OK',
    changes: 'me',
    audited: 'ok ',
  },
  {
    row: 0,
    when: 'a user who must change the password does',
    me: { mustChange: true },
    code: 'OK',
    changes: 'me',
    audited: 'ok ',
  },
  {
    row: 0,
    when: "a super-user sets another's password without the old one, with all that goes with it",
    me: superUser,
    message: ({ other }) => ({
      oldPassword: undefined,
      userId: other.userId,
      passwordExpiry: 36_500,
      mustChange: true,
    }),
    code: 'OK',
    changes: 'other',
    audited: 'ok ',
  },
  {
    row: 0,
    when: "a super-user sends another's right old password",
    me: superUser,
    message: ({ other }) => ({ userId: other.userId, oldPassword: other.password }),
    code: 'OK',
    changes: 'other',
    audited: 'ok ',
  },
  {
    row: 0,
    when: 'a super-user changes the password of somebody locked',
    me: superUser,
    other: { isLocked: true },
    message: ({ other }) => ({ userId: other.userId, oldPassword: undefined }),
    code: 'OK',
    changes: 'other',
    audited: 'ok ',
  },
  {
    row: 0,
    when: 'a super-user whose own password has expired changes the own one',
    me: { isSuperUser: true, hasExpired: true },
    message: () => ({ passwordExpiry: 1 }),
    code: 'OK',
    changes: 'me',
    audited: 'ok ',
  },
  {
    row: 0,
    when: 'nothing but a check is asked for',
    message: () => ({ validateOnly: true }),
    code: 'OK',
    audited: 'validated ',
  },

  // ---- 1: malformed
  malformed('there is no app', ['app REQUIRED'], { metadata: () => ({ app: undefined }) }),
  malformed('the app is empty', ['app REQUIRED'], { metadata: () => ({ app: '' }) }),
  malformed('the app is too long', ['app MALFORMED'], { metadata: () => ({ app: 'A'.repeat(129) }) }),
  malformed('the cid is empty', ['cid REQUIRED'], { metadata: () => ({ cid: '' }), newCid: true }),
  malformed('the cid is too long', ['cid MALFORMED'], {
    metadata: () => ({ cid: 'c'.repeat(129) }),
    newCid: true,
  }),
  malformed('the ust is far too long', ['ust MALFORMED'], { metadata: () => ({ ust: 'u'.repeat(513) }) }),
  malformed('the ust is empty', ['ust REQUIRED'], { metadata: () => ({ ust: '' }) }),
  malformed('the idempotency-key is empty', ['idempotency-key REQUIRED'], {
    metadata: () => ({ 'idempotency-key': '' }),
  }),
  malformed('the idempotency-key is too long', ['idempotency-key MALFORMED'], {
    metadata: () => ({ 'idempotency-key': 'k'.repeat(129) }),
  }),
  ...['', 'localhost', '192.0.2.256', '192.0.2.1:80', '2001:db8::g', 'fe80::1%eth0'].map((address) =>
    malformed(`the remote-addr is "${address}"`, [`remote-addr ${address ? 'MALFORMED' : 'REQUIRED'}`], {
      metadata: () => ({ 'remote-addr': address }),
    }),
  ),
  malformed('new_password is empty', ['new_password REQUIRED'], { message: () => ({ newPassword: '' }) }),
  malformed('old_password is empty', ['old_password REQUIRED'], { message: () => ({ oldPassword: '' }) }),
  malformed('user_id is empty', ['user_id REQUIRED'], { message: () => ({ userId: '' }) }),
  malformed('user_id is too long', ['user_id MALFORMED'], { message: () => ({ userId: 'x'.repeat(65) }) }),
  malformed('user_id is no ASCII', ['user_id MALFORMED'], { message: () => ({ userId: 'Zoë' }) }),
  malformed('user_id holds a space', ['user_id MALFORMED'], { message: () => ({ userId: 'a b' }) }),
  ...[0, -1, 36_501, 2_147_483_647, -2_147_483_648].map((passwordExpiry) =>
    malformed(`password_expiry is ${passwordExpiry}`, ['password_expiry OUT_OF_RANGE'], {
      me: superUser,
      message: () => ({ passwordExpiry }),
    }),
  ),
  malformed(
    'nearly everything is wrong, and all of it is told',
    [
      'app REQUIRED',
      'cid MALFORMED',
      'new_password REQUIRED',
      'password_expiry OUT_OF_RANGE',
      'user_id REQUIRED',
    ],
    {
      metadata: () => ({ app: undefined, cid: 'c'.repeat(500), ust: undefined }),
      message: () => ({ newPassword: '', passwordExpiry: 0, userId: '' }),
      newCid: true,
    },
  ),

  // ---- 2: no session
  noSession('there is no ust', { metadata: () => ({ ust: undefined }) }),
  noSession('the ust is unknown', { metadata: () => ({ ust: randomUUID() }) }),
  noSession('the ust is a good one in another case', {
    metadata: ({ me }) => ({ ust: swapCase(me.ust) }),
  }),
  noSession('the session has expired', {
    first: (service, { me }) =>
      service.sql(
        'UPDATE sessions SET expires_at = UTC_TIMESTAMP(6) - INTERVAL 1 MICROSECOND WHERE user_id = ?',
        [me.userId],
      ),
  }),
  noSession('the session was ended', {
    first: (service, { me }) =>
      service.sql('UPDATE sessions SET ended_at = UTC_TIMESTAMP(6) WHERE user_id = ?', [me.userId]),
  }),

  // ---- 3: app
  ...['MRP', 'crm', 'CRM2', 'CRM,ERP'].map((app) =>
    denied(3, 'APP_NOT_ALLOWED', 'E004001', `the app is "${app}"`, { metadata: () => ({ app }) }),
  ),

  // ---- 4: standing
  denied(4, 'USER_LOCKED', 'E005002', 'the user is locked', { me: { isLocked: true } }),
  denied(4, 'USER_LOCKED', 'E005002', 'a super-user is locked', {
    me: { isLocked: true, isSuperUser: true },
  }),
  denied(4, 'USER_NOT_APPROVED', 'E005003', 'the account is pending', { me: { approval: 'pending' } }),
  denied(4, 'USER_NOT_APPROVED', 'E005004', 'the account was rejected', { me: { approval: 'rejected' } }),

  // ---- 5: rights
  ...(
    [
      ["another's user_id", ({ other }) => ({ userId: other.userId })],
      [
        "another's user_id and right old password",
        ({ other }) => ({ userId: other.userId, oldPassword: other.password }),
      ],
      [
        "another's user_id and no old password",
        ({ other }) => ({ userId: other.userId, oldPassword: undefined }),
      ],
      ["nobody's user_id", () => ({ userId: randomUUID() })],
      ['the own user_id in another case', ({ me }) => ({ userId: me.userId.toUpperCase() })],
      ['password_expiry', () => ({ passwordExpiry: 1 })],
      ['must_change: true', () => ({ mustChange: true })],
      ['must_change: false', () => ({ mustChange: false })],
      ['the own user_id with password_expiry', ({ me }) => ({ userId: me.userId, passwordExpiry: 730 })],
      [
        'all three, and only to check',
        ({ other }) => ({ userId: other.userId, passwordExpiry: 1, mustChange: true, validateOnly: true }),
      ],
    ] satisfies [string, NonNullable<Row['message']>][]
  ).map(([what, message]) =>
    denied(5, 'SUPER_USER_REQUIRED', 'E005001', `a regular user sends ${what}`, { message }),
  ),

  // ---- 6: the own password first
  {
    row: 6,
    when: 'a super-user whose own password has expired acts on another',
    me: { isSuperUser: true, hasExpired: true },
    message: ({ other }) => ({ userId: other.userId, oldPassword: undefined }),
    code: 'FAILED_PRECONDITION',
    reason: 'OWN_PASSWORD_CHANGE_REQUIRED',
    subStatus: 'E003004',
    audited: 'refused OWN_PASSWORD_CHANGE_REQUIRED',
  },
  {
    row: 6,
    when: 'a super-user who must change the own password acts on another',
    me: { isSuperUser: true, mustChange: true },
    message: ({ other }) => ({ userId: other.userId, oldPassword: undefined }),
    code: 'FAILED_PRECONDITION',
    reason: 'OWN_PASSWORD_CHANGE_REQUIRED',
    subStatus: 'E003007',
    audited: 'refused OWN_PASSWORD_CHANGE_REQUIRED',
  },

  // ---- 7: unknown user
  {
    row: 7,
    when: 'a super-user names an unknown user',
    me: superUser,
    message: () => ({ userId: randomUUID(), oldPassword: undefined }),
    code: 'NOT_FOUND',
    reason: 'USER_NOT_FOUND',
    subStatus: 'E008002',
    audited: 'refused USER_NOT_FOUND',
  },

  // ---- 8: the guard
  {
    row: 8,
    when: 'ten old passwords were wrong, though this one is right',
    first: (service, { me }) => spendAttempts(service, me),
    code: 'RESOURCE_EXHAUSTED',
    reason: 'TOO_MANY_ATTEMPTS',
    hasRetry: true,
    audited: 'refused TOO_MANY_ATTEMPTS',
  },
  {
    row: 8,
    when: "a super-user sends another's old password after ten wrong ones",
    me: superUser,
    first: (service, { other }) => spendAttempts(service, other),
    message: ({ other }) => ({ userId: other.userId, oldPassword: other.password }),
    code: 'RESOURCE_EXHAUSTED',
    reason: 'TOO_MANY_ATTEMPTS',
    hasRetry: true,
    audited: 'refused TOO_MANY_ATTEMPTS',
  },
  {
    row: 0,
    when: 'ten old passwords were wrong, but longer ago than the window',
    first: async (service, { me }) => {
      await spendAttempts(service, me);
      await service.sql(
        'UPDATE users SET old_password_attempts_since = UTC_TIMESTAMP(6) - INTERVAL 901 SECOND WHERE user_id = ?',
        [me.userId],
      );
    },
    code: 'OK',
    changes: 'me',
    audited: 'ok ',
  },
  {
    row: 0,
    when: 'a super-user sends no old password after ten wrong ones',
    me: superUser,
    first: (service, { other }) => spendAttempts(service, other),
    message: ({ other }) => ({ userId: other.userId, oldPassword: undefined }),
    code: 'OK',
    changes: 'other',
    audited: 'ok ',
  },

  // ---- 9: policy
  policy('new_password is one short', 'kV9#xq2', ['TOO_SHORT', 'TOO_WEAK'], 'E003002,E003008', {
    ...SHORTEST,
    ...SIMPLEST,
  }),
  policy('new_password is 7 emoji', '🦊🎷🧊🪐🍋🧵🛶', ['TOO_SHORT'], 'E003002', SHORTEST),
  policy('new_password is one too long', `${'Xk4-'.repeat(64)}!`, ['TOO_LONG'], 'E003003', LONGEST),
  policy('new_password is 257 emoji', '🦊🎷🧊'.repeat(86).slice(0, 514), ['TOO_LONG'], 'E003003', LONGEST),
  policy('new_password has 10 000 characters', 'Xk4-'.repeat(2500), ['TOO_LONG'], 'E003003', LONGEST),
  policy('new_password is too easy', 'qwertzuiopasd', ['TOO_WEAK'], 'E003008', SIMPLEST),
  policy('new_password holds a rejected word', 'mAcmE-84-zq#-Tk', ['REJECTED'], 'E003001', {}),
  policy('new_password is common', 'iloveyou', ['COMMON', 'TOO_WEAK'], 'E003008,E003001', SIMPLEST),
  policy(
    'new_password holds the username',
    'x9#-ROBINSON-Vq7!k',
    ['CONTAINS_USER_INFO'],
    'E003001',
    {},
    { me: { username: 'robinson' } },
  ),
  policy(
    'new_password holds the mailbox',
    'x9#-penelope-Vq7!k',
    ['CONTAINS_USER_INFO'],
    'E003001',
    {},
    { me: { email: 'penelope@example.org' } },
  ),
  policy('new_password is the old one', ({ me }) => me.password, ['SAME_AS_OLD'], 'E003001', {}),
  policy(
    'new_password breaks four rules at once',
    'acme12',
    ['REJECTED', 'TOO_SHORT', 'TOO_WEAK'],
    'E003002,E003008,E003001',
    { ...SHORTEST, ...SIMPLEST },
  ),
  policy("a super-user sets another's password to an easy one", '', ['TOO_WEAK'], 'E003008', SIMPLEST, {
    me: superUser,
    message: ({ other }) => ({ userId: other.userId, oldPassword: undefined, newPassword: 'qwertzuiopasd' }),
  }),

  // ---- 10: the old password is needed
  ...[regular, superUser].map(
    (me): Row => ({
      row: 10,
      when: `a ${me.isSuperUser ? 'super-user' : 'regular user'} sends no old_password for the own change`,
      me,
      message: () => ({ oldPassword: undefined }),
      code: 'INVALID_ARGUMENT',
      reason: 'INVALID_REQUEST',
      subStatus: 'E008003',
      violations: ['old_password REQUIRED'],
      audited: 'refused INVALID_REQUEST',
    }),
  ),

  // ---- 11: the old password is wrong
  denied(11, 'OLD_PASSWORD_MISMATCH', 'E005001', 'old_password is another', {
    message: () => ({ oldPassword: strongPassword() }),
  }),
  denied(11, 'OLD_PASSWORD_MISMATCH', 'E005001', 'old_password differs in case', {
    message: ({ me }) => ({ oldPassword: swapCase(me.password) }),
  }),
  denied(11, 'OLD_PASSWORD_MISMATCH', 'E005001', 'old_password has a space behind it', {
    message: ({ me }) => ({ oldPassword: `${me.password} ` }),
  }),
  denied(11, 'OLD_PASSWORD_MISMATCH', 'E005001', 'old_password is wrong, and a check is asked for', {
    message: () => ({ oldPassword: strongPassword(), validateOnly: true }),
  }),
  denied(11, 'OLD_PASSWORD_MISMATCH', 'E005001', "a super-user sends another's wrong old password", {
    me: superUser,
    message: ({ other }) => ({ userId: other.userId, oldPassword: strongPassword() }),
  }),

  // ---- 13: an idempotency key used for something else
  {
    row: 13,
    when: 'the idempotency-key was used for another request',
    first: async (service, { me, cid }) => {
      const next = strongPassword();
      const metadata = { ust: me.ust, app: 'CRM', 'idempotency-key': `k ${cid}` };
      const message = { oldPassword: me.password, newPassword: next };
      assert.equal((await service.server.change(metadata, message)).code, 'OK');
    },
    metadata: ({ cid }) => ({ 'idempotency-key': `k ${cid}` }),
    code: 'INVALID_ARGUMENT',
    reason: 'IDEMPOTENCY_KEY_REUSED',
    subStatus: 'E008002',
    audited: 'refused IDEMPOTENCY_KEY_REUSED',
  },

  // ---- the first row that matches wins
  malformed('there is neither app nor session', ['app REQUIRED'], {
    metadata: () => ({ app: undefined, ust: undefined }),
  }),
  noSession('there is no session and the app is not listed', {
    metadata: () => ({ ust: undefined, app: 'MRP' }),
  }),
  denied(3, 'APP_NOT_ALLOWED', 'E004001', 'the user is locked, too', {
    me: { isLocked: true },
    metadata: () => ({ app: 'MRP' }),
  }),
  denied(4, 'USER_LOCKED', 'E005002', 'the locked user is not approved and no super-user either', {
    me: { isLocked: true, approval: 'pending' },
    message: () => ({ mustChange: true }),
  }),
  denied(5, 'SUPER_USER_REQUIRED', 'E005001', 'a regular user with an expired password names nobody', {
    me: { hasExpired: true },
    message: () => ({ userId: randomUUID(), newPassword: 'a' }),
  }),
  {
    row: 6,
    when: 'a super-user whose own password has expired names nobody',
    me: { isSuperUser: true, hasExpired: true },
    message: () => ({ userId: randomUUID(), newPassword: 'a' }),
    code: 'FAILED_PRECONDITION',
    reason: 'OWN_PASSWORD_CHANGE_REQUIRED',
    subStatus: 'E003004',
    audited: 'refused OWN_PASSWORD_CHANGE_REQUIRED',
  },
  {
    row: 7,
    when: 'a super-user sets a bad password for nobody',
    me: superUser,
    message: () => ({ userId: randomUUID(), newPassword: 'a' }),
    code: 'NOT_FOUND',
    reason: 'USER_NOT_FOUND',
    subStatus: 'E008002',
    audited: 'refused USER_NOT_FOUND',
  },
  {
    row: 8,
    when: 'the guard is shut and new_password is bad, too',
    first: (service, { me }) => spendAttempts(service, me),
    message: () => ({ newPassword: 'a' }),
    code: 'RESOURCE_EXHAUSTED',
    reason: 'TOO_MANY_ATTEMPTS',
    hasRetry: true,
    audited: 'refused TOO_MANY_ATTEMPTS',
  },
  {
    row: 8,
    when: 'the guard is shut and old_password is missing, too',
    first: (service, { me }) => spendAttempts(service, me),
    message: () => ({ oldPassword: undefined }),
    code: 'RESOURCE_EXHAUSTED',
    reason: 'TOO_MANY_ATTEMPTS',
    hasRetry: true,
    audited: 'refused TOO_MANY_ATTEMPTS',
  },
  policy(
    'old_password is missing, too',
    '',
    ['TOO_SHORT', 'TOO_WEAK'],
    'E003002,E003008',
    { ...SHORTEST, ...SIMPLEST },
    {
      message: () => ({ oldPassword: undefined, newPassword: 'kV9#' }),
    },
  ),
  policy(
    'old_password is wrong, too',
    '',
    ['TOO_SHORT', 'TOO_WEAK'],
    'E003002,E003008',
    { ...SHORTEST, ...SIMPLEST },
    {
      message: () => ({ oldPassword: strongPassword(), newPassword: 'kV9#' }),
    },
  ),
];

const swapCase = (text: string) =>
  text.replace(/[a-z]/gi, (letter) =>
    letter === letter.toLowerCase() ? letter.toUpperCase() : letter.toLowerCase(),
  );

async function spendAttempts(service: Service, { userId }: TestUser): Promise<void> {
  await service.sql(
    'UPDATE users SET old_password_attempts = 10, old_password_attempts_since = UTC_TIMESTAMP(6) WHERE user_id = ?',
    [userId],
  );
}

const defined = <T extends object>(value: T) =>
  Object.fromEntries(Object.entries(value).filter(([, each]) => each !== undefined));

describe('the decision table', () => {
  let service: Service;
  before(async () => {
    service = await startService({ REKEY_POLICY_REJECT: 'acme,Rekey' });
  });
  after(() => service.stop());

  for (const row of rows) {
    it(`row ${row.row}: ${row.reason ?? row.code} if ${row.when}`, async () => {
      const cast = {
        me: await service.createUser(row.me),
        other: await service.createUser(row.other),
        cid: `t-${randomUUID()}`,
      };
      await row.first?.(service, cast);
      const metadata = defined({
        ust: cast.me.ust,
        app: 'CRM',
        cid: cast.cid,
        ...row.metadata?.(cast),
      }) as Metadata;
      const message = defined({
        oldPassword: cast.me.password,
        newPassword: strongPassword(),
        ...row.message?.(cast),
      });
      const hashes = async () => ({
        me: await service.storedHash(cast.me.userId),
        other: await service.storedHash(cast.other.userId),
      });

      const before = await hashes();
      const answer = await service.server.change(metadata, message);
      const after = await hashes();

      assert.deepEqual(
        {
          code: answer.code,
          reason: answer.reason,
          violations: answer.violations,
          subStatus: answer.metadata.sub_status,
          limits: limitsOf(answer),
          hasRetry: answer.retryMs !== undefined,
          changed: (['me', 'other'] as const).filter((who) => before[who] !== after[who]),
        },
        {
          code: row.code,
          reason: row.reason ?? '',
          violations: [...(row.violations ?? [])].sort(),
          subStatus: row.subStatus,
          limits: row.limits ?? {},
          hasRetry: row.hasRetry ?? false,
          changed: row.changes ? [row.changes] : [],
        },
      );
      if (row.newCid) assert.match(answer.cid ?? '', /^[0-9a-f-]{36}$/);
      else assert.equal(answer.cid, cast.cid);
      if (row.hasRetry) assert.ok((answer.retryMs as number) > 0 && (answer.retryMs as number) <= 900_000);

      const records = await service.auditOf(answer.cid as string);
      assert.deepEqual(
        records.map(({ outcome, reason }) => `${outcome} ${reason}`),
        row.audited === undefined ? [] : [row.audited],
      );
      const line = await service.server.lineOf(answer.cid as string);
      assert.equal(line.code, row.code);
      assert.equal(line.reason, row.reason);
      const [record] = records;
      if (record) {
        assert.equal(record.action, 'ChangePassword');
        assert.equal(record.actor_user_id, cast.me.userId);
        assert.equal(record.target_user_id, message.userId ?? cast.me.userId);
        assert.equal(record.app, metadata.app);
      }
      if (row.changes) {
        assert.ok(await service.isPassword(cast[row.changes].userId, message.newPassword as string));
      }
    });
  }

  it('a cid is made where none was sent', async () => {
    const me = await service.createUser();
    const ok = await service.server.change(
      { ust: me.ust, app: 'CRM' },
      { oldPassword: me.password, newPassword: strongPassword() },
    );
    assert.equal(ok.code, 'OK');
    assert.match(ok.cid ?? '', /^[0-9a-f-]{36}$/);
    const refused = await service.server.change({ app: 'CRM' }, { newPassword: strongPassword() });
    assert.equal(refused.code, 'UNAUTHENTICATED');
    assert.match(refused.cid ?? '', /^[0-9a-f-]{36}$/);
  });

  it('no answer to an unauthenticated caller differs from another but in its cid', async () => {
    const me = await service.createUser();
    const expired = await service.openSession(me.userId, { lifetimeSeconds: -1 });
    const ended = await service.openSession(me.userId);
    await service.sql('UPDATE sessions SET ended_at = UTC_TIMESTAMP(6) WHERE user_id = ?', [me.userId]);
    const answers = [];
    for (const ust of [expired, ended, randomUUID(), 'x']) {
      answers.push(await service.server.change({ ust, app: 'CRM', cid: 'same' }, { newPassword: 'abc' }));
    }
    answers.push(await service.server.change({ app: 'CRM', cid: 'same' }, { newPassword: 'abc' }));
    for (const answer of answers) assert.deepEqual(answer, answers[0]);
  });
});

const limitsOf = ({ metadata: { cid: _, sub_status: __, ...limits } }: Answer) => limits;

describe('row 12: CONCURRENT_CHANGE', () => {
  let service: Service;
  before(async () => {
    service = await startService();
  });
  after(() => service.stop());

  const meanwhile: [string, UserOptions, string, boolean][] = [
    [
      'the password is changed',
      {},
      'UPDATE users SET password_hash = CONCAT(password_hash, "A") WHERE user_id = ?',
      true,
    ],
    ['the session is ended', {}, 'UPDATE sessions SET ended_at = UTC_TIMESTAMP(6) WHERE user_id = ?', true],
    ['the session expires', {}, 'UPDATE sessions SET expires_at = opened_at WHERE user_id = ?', true],
    ['the user is locked', {}, 'UPDATE users SET is_locked = TRUE WHERE user_id = ?', true],
    ['the approval is withdrawn', {}, "UPDATE users SET approval = 'rejected' WHERE user_id = ?", true],
    [
      'the super-user is demoted',
      superUser,
      'UPDATE users SET is_super_user = FALSE WHERE user_id = ?',
      false,
    ],
    ['the super-user is locked', superUser, 'UPDATE users SET is_locked = TRUE WHERE user_id = ?', false],
    [
      "the super-user's session is ended",
      superUser,
      'UPDATE sessions SET ended_at = UTC_TIMESTAMP(6) WHERE user_id = ?',
      false,
    ],
    [
      "the super-user's password expires",
      superUser,
      'UPDATE users SET password_expires_at = created_at WHERE user_id = ?',
      false,
    ],
  ];
  for (const [what, options, statement, isOwn] of meanwhile) {
    it(`nothing is changed if ${what} while the call is under way`, async () => {
      const me = await service.createUser(options);
      const other = await service.createUser();
      const target = isOwn ? me : other;
      const cid = `t-${randomUUID()}`;
      // The call's transaction waits for the lock, so that what happens here happens before it.
      const change = await service.whileLocked(me.userId, async () => {
        const call = service.server.change(
          { ust: me.ust, app: 'CRM', cid },
          {
            ...(isOwn ? { oldPassword: me.password } : { userId: other.userId }),
            newPassword: strongPassword(),
          },
        );
        await service.waitForLockWaits();
        await service.sql(statement, [me.userId]);
        return { call };
      });
      const hash = await service.storedHash(target.userId);

      const answer = await change.call;
      assert.equal(answer.code, 'ABORTED');
      assert.equal(answer.reason, 'CONCURRENT_CHANGE');
      assert.equal(await service.storedHash(target.userId), hash);
      const records = await service.auditOf(cid);
      assert.deepEqual(
        records.map(({ outcome, reason }) => `${outcome} ${reason}`),
        ['refused CONCURRENT_CHANGE'],
      );
    });
  }
});

describe('rows 14 to 17: what the server itself cannot do', () => {
  it('row 14: OVERLOADED if there is no room to hash before the deadline', async () => {
    const service = await startService({
      REKEY_HASH_SLOTS: '1',
      REKEY_HASH_QUEUE_LENGTH: '2',
      REKEY_HASH_MEMORY_KIB: '32768',
      REKEY_HASH_ITERATIONS: '4',
    });
    try {
      const people = await Promise.all(Array.from({ length: 8 }, () => service.createUser()));
      const answers = await Promise.all(
        people.map((me) =>
          service.server.change(
            { ust: me.ust, app: 'CRM' },
            { oldPassword: me.password, newPassword: strongPassword() },
          ),
        ),
      );
      const overloaded = answers.filter(({ reason }) => reason === 'OVERLOADED');
      const done = answers.filter(({ code }) => code === 'OK');
      assert.equal(overloaded.length + done.length, people.length);
      assert.ok(overloaded.length >= 1 && done.length >= 1, `${done.length} done`);
      for (const answer of overloaded) {
        assert.equal(answer.code, 'RESOURCE_EXHAUSTED');
        assert.ok((answer.retryMs ?? 0) > 0);
        const [record] = await service.auditOf(answer.cid as string);
        assert.equal(record?.reason, 'OVERLOADED');
        // Who was not served was not tried either: no attempt is counted.
        const [user] = await service.sql(
          'SELECT old_password_attempts AS attempts FROM users WHERE user_id = ?',
          [record?.actor_user_id],
        );
        assert.equal(user?.attempts, 0);
      }
    } finally {
      await service.stop();
    }
  });

  it('row 15: DEADLINE_EXCEEDED and CANCELLED while the database is locked, and nothing is changed', async () => {
    const service = await startService();
    try {
      const me = await service.createUser();
      const hash = await service.storedHash(me.userId);
      const message = { oldPassword: me.password, newPassword: strongPassword() };
      const metadata = { ust: me.ust, app: 'CRM' };
      await service.whileLocked(me.userId, async () => {
        const late = await service.server.change({ ...metadata, cid: 'late' }, message, { timeoutMs: 400 });
        // The server, which has the same deadline, may be a moment quicker than the client to say so.
        assert.ok(['DEADLINE_EXCEEDED', 'UNAVAILABLE'].includes(late.code), late.code);
        const abort = new AbortController();
        const call = service.server.change({ ...metadata, cid: 'gone' }, message, { signal: abort.signal });
        await service.waitForLockWaits();
        abort.abort();
        assert.equal((await call).code, 'CANCELLED');
      });
      assert.notEqual((await service.server.lineOf('late')).code, 'OK');
      assert.equal((await service.server.lineOf('gone')).reason, 'CANCELLED');
      assert.equal(await service.storedHash(me.userId), hash);
    } finally {
      await service.stop();
    }
  });

  it('row 15: DEADLINE_EXCEEDED with all details if the time limit of the server itself is over', async () => {
    const service = await startService({ REKEY_LIMITS_CALL_TIMEOUT_MS: '400' });
    try {
      const me = await service.createUser();
      const answer = await service.whileLocked(me.userId, () =>
        service.server.change(
          { ust: me.ust, app: 'CRM', cid: 'limit' },
          { oldPassword: me.password, newPassword: strongPassword() },
        ),
      );
      assert.ok(['DEADLINE_EXCEEDED', 'UNAVAILABLE'].includes(answer.code));
      assert.equal(answer.reason, answer.code);
      assert.equal(answer.cid, 'limit');
    } finally {
      await service.stop();
    }
  });

  it('row 16: UNAVAILABLE while the database is away, and OK once it is back', async () => {
    const service = await startService({}, { gated: true });
    try {
      const me = await service.createUser();
      const hash = await service.storedHash(me.userId);
      const message = { oldPassword: me.password, newPassword: strongPassword() };
      const change = (cid: string, timeoutMs?: number) =>
        service.server.change({ ust: me.ust, app: 'CRM', cid }, message, timeoutMs ? { timeoutMs } : {});

      await service.gate?.shut();
      // The server gives up a little before the deadline, since no further try would fit.
      const away = await eventually('an answer that came in time', async () => {
        const answer = await change(`away-${randomUUID()}`, 1500);
        return answer.code === 'UNAVAILABLE' && answer;
      });
      assert.equal(away.reason, 'UNAVAILABLE');
      assert.ok((away.retryMs ?? 0) > 0);
      assert.equal((await service.server.lineOf(away.cid as string)).level, 'warn');
      assert.equal(await service.storedHash(me.userId), hash);
      assert.deepEqual(await service.auditOf(away.cid as string), []);

      await service.gate?.open();
      assert.equal((await change('back')).code, 'OK');
      assert.deepEqual((await service.auditOf('back')).length, 1);
    } finally {
      await service.stop();
    }
  });

  it('row 17: INTERNAL without its cause, which is in the log under the cid', async () => {
    const service = await startService();
    try {
      const me = await service.createUser();
      const hash = await service.storedHash(me.userId);
      const change = (cid: string) =>
        service.server.change(
          { ust: me.ust, app: 'CRM', cid },
          { oldPassword: me.password, newPassword: strongPassword() },
        );
      const breakings: [string, string, string][] = [
        [
          'no-audit',
          'ALTER TABLE audit_log RENAME COLUMN claimed_addr TO claimed',
          'ALTER TABLE audit_log RENAME COLUMN claimed TO claimed_addr',
        ],
        ['no-table', 'RENAME TABLE sessions TO elsewhere', 'RENAME TABLE elsewhere TO sessions'],
        [
          'no-hash',
          'UPDATE users SET password_hash = REVERSE(password_hash)',
          'UPDATE users SET password_hash = REVERSE(password_hash)',
        ],
      ];
      for (const [cid, breakIt, mendIt] of breakings) {
        await service.sql(breakIt);
        const answer = await change(cid);
        assert.equal(answer.code, 'INTERNAL', cid);
        assert.equal(answer.reason, 'INTERNAL');
        assert.deepEqual(answer.metadata, { cid });
        assert.deepEqual(answer.detailTypes, ['google.rpc.ErrorInfo', 'google.rpc.RequestInfo']);
        const line = await service.server.lineOf(cid);
        assert.equal(line.level, 'error');
        assert.ok((line.err as { message?: string }).message, 'the cause is in the log');
        await service.sql(mendIt);
        assert.equal(await service.storedHash(me.userId), hash, 'nothing was half-done');
      }
      assert.equal((await change('mended')).code, 'OK');
    } finally {
      await service.stop();
    }
  });
});
