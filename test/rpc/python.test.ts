import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { after, before, describe, it } from 'node:test';
import { ErrorReason } from '../../gen/rekey/v1/error_reason_pb.ts';
import {
  type Service,
  startService,
  strongPassword,
  type TestUser,
  type UserOptions,
} from '../support/service.ts';
import { findPython, type PythonClient, type PythonOutcome, startPythonClient } from './python/client.ts';

interface Row {
  row: number;
  when: string;
  me?: UserOptions;
  /** Run before the call. */
  first?: (me: TestUser, other: TestUser) => Promise<unknown>;
  metadata?: Record<string, string | undefined>;
  message?: (me: TestUser, other: TestUser) => Record<string, unknown>;
  code: string;
  reason?: keyof typeof ErrorReason;
  violations?: string[];
  subStatus?: string;
  limits?: Record<string, string>;
  hasRetry?: boolean;
}

const INVALID = { code: 'INVALID_ARGUMENT', reason: 'INVALID_REQUEST' } as const;
const DENIED = { code: 'PERMISSION_DENIED' } as const;

const found = await findPython();
const skip = 'skip' in found ? found.skip : false;

describe('the decision table, called from Python', { skip }, () => {
  let service: Service;
  let python: PythonClient | undefined;
  before(async () => {
    service = await startService();
    if ('python' in found) python = await startPythonClient(found.python, service.server.address);
  });
  after(async () => {
    await python?.close();
    await service.stop();
  });

  const rows: Row[] = [
    { row: 0, when: 'a regular user changes the own password', code: 'OK' },
    {
      row: 0,
      when: "a super-user sets another's password",
      me: { isSuperUser: true },
      message: (_, other) => ({
        old_password: undefined,
        user_id: other.userId,
        password_expiry: 7,
        must_change: true,
      }),
      code: 'OK',
    },
    {
      row: 1,
      when: 'app and new_password are missing and password_expiry is 0',
      metadata: { app: undefined },
      message: () => ({ new_password: '', password_expiry: 0 }),
      ...INVALID,
      violations: ['app REQUIRED', 'new_password REQUIRED', 'password_expiry OUT_OF_RANGE'],
      subStatus: 'E008002,E008003',
    },
    {
      row: 2,
      when: 'there is no ust',
      metadata: { ust: undefined },
      code: 'UNAUTHENTICATED',
      reason: 'SESSION_INVALID',
      subStatus: 'E007001',
    },
    {
      row: 3,
      when: 'the app is not listed',
      metadata: { app: 'MRP' },
      ...DENIED,
      reason: 'APP_NOT_ALLOWED',
      subStatus: 'E004001',
    },
    {
      row: 4,
      when: 'the user is locked',
      me: { isLocked: true },
      ...DENIED,
      reason: 'USER_LOCKED',
      subStatus: 'E005002',
    },
    {
      row: 4,
      when: 'the account is pending',
      me: { approval: 'pending' },
      ...DENIED,
      reason: 'USER_NOT_APPROVED',
      subStatus: 'E005003',
    },
    {
      row: 5,
      when: "a regular user sends another's user_id",
      message: (_, other) => ({ user_id: other.userId }),
      ...DENIED,
      reason: 'SUPER_USER_REQUIRED',
      subStatus: 'E005001',
    },
    {
      row: 5,
      when: 'a regular user sends must_change: false, which is not the same as not sending it',
      message: () => ({ must_change: false }),
      ...DENIED,
      reason: 'SUPER_USER_REQUIRED',
      subStatus: 'E005001',
    },
    {
      row: 6,
      when: 'a super-user whose own password has expired acts on another',
      me: { isSuperUser: true, hasExpired: true },
      message: (_, other) => ({ user_id: other.userId }),
      code: 'FAILED_PRECONDITION',
      reason: 'OWN_PASSWORD_CHANGE_REQUIRED',
      subStatus: 'E003004',
    },
    {
      row: 7,
      when: 'a super-user names nobody',
      me: { isSuperUser: true },
      message: () => ({ user_id: randomUUID() }),
      code: 'NOT_FOUND',
      reason: 'USER_NOT_FOUND',
      subStatus: 'E008002',
    },
    {
      row: 8,
      when: 'ten old passwords were wrong',
      first: (me) =>
        service.sql(
          'UPDATE users SET old_password_attempts = 10, old_password_attempts_since = UTC_TIMESTAMP(6) WHERE user_id = ?',
          [me.userId],
        ),
      code: 'RESOURCE_EXHAUSTED',
      reason: 'TOO_MANY_ATTEMPTS',
      hasRetry: true,
    },
    {
      row: 9,
      when: 'new_password breaks several rules',
      message: () => ({ new_password: 'hunter2' }),
      code: 'INVALID_ARGUMENT',
      reason: 'PASSWORD_POLICY',
      violations: ['new_password COMMON', 'new_password TOO_SHORT', 'new_password TOO_WEAK'],
      subStatus: 'E003002,E003008,E003001',
      limits: { min_length: '8', min_complexity: '3' },
    },
    {
      row: 10,
      when: 'old_password is missing',
      message: () => ({ old_password: undefined }),
      ...INVALID,
      violations: ['old_password REQUIRED'],
      subStatus: 'E008003',
    },
    {
      row: 11,
      when: 'old_password is wrong',
      message: () => ({ old_password: strongPassword() }),
      ...DENIED,
      reason: 'OLD_PASSWORD_MISMATCH',
      subStatus: 'E005001',
    },
    {
      row: 13,
      when: 'the idempotency-key was used for another request',
      first: (me) =>
        service.server.change(
          { ust: me.ust, app: 'CRM', 'idempotency-key': 'python' },
          { oldPassword: me.password, newPassword: strongPassword() },
        ),
      metadata: { 'idempotency-key': 'python' },
      code: 'INVALID_ARGUMENT',
      reason: 'IDEMPOTENCY_KEY_REUSED',
      subStatus: 'E008002',
    },
    {
      row: 17,
      when: 'a stored hash is of no known format',
      first: (me) => service.sql("UPDATE users SET password_hash = '$2b$12$' WHERE user_id = ?", [me.userId]),
      code: 'INTERNAL',
      reason: 'INTERNAL',
    },
  ];

  for (const row of rows) {
    it(`row ${row.row}: ${row.reason ?? row.code} if ${row.when}`, async () => {
      const [me, other] = [await service.createUser(row.me), await service.createUser()];
      await row.first?.(me, other);
      const cid = `python-${randomUUID()}`;
      const outcome = await (python as PythonClient).call(
        'UserService',
        'ChangePassword',
        // What is undefined is left out by JSON.
        { ust: me.ust, app: 'CRM', cid, ...row.metadata } as Record<string, string>,
        { old_password: me.password, new_password: strongPassword(), ...row.message?.(me, other) },
      );
      assert.equal(outcome.initial.cid, cid);
      const { cid: _, sub_status, ...limits } = outcome.details.ErrorInfo?.metadata ?? {};
      assert.deepEqual(
        {
          code: outcome.code,
          reason: outcome.details.ErrorInfo?.reason,
          number: outcome.number ?? undefined,
          violations: violationsOf(outcome),
          subStatus: sub_status,
          limits,
          hasRetry: outcome.details.RetryInfo !== undefined,
        },
        {
          code: row.code,
          reason: row.reason,
          number: row.reason && ErrorReason[row.reason],
          violations: row.violations ?? [],
          subStatus: row.subStatus,
          limits: row.limits ?? {},
          hasRetry: row.hasRetry ?? false,
        },
      );
      if (row.code === 'OK') assert.match(String(outcome.response?.password_expiry_time), /^\d{4}-/);
      else {
        assert.equal(outcome.details.ErrorInfo?.domain, 'rekey');
        assert.equal(outcome.details.ErrorInfo?.metadata.cid, cid);
        assert.equal(outcome.details.RequestInfo?.request_id, cid);
      }
    });
  }
});

const violationsOf = ({ details }: PythonOutcome) =>
  (details.BadRequest?.field_violations ?? []).map(({ field, reason }) => `${field} ${reason}`).sort();
