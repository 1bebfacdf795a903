import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { enumFromJson, fromBinary, type Message } from '@bufbuild/protobuf';
import type { GenMessage } from '@bufbuild/protobuf/codegenv2';
import { anyUnpack, durationMs } from '@bufbuild/protobuf/wkt';
import { status as Code } from '@grpc/grpc-js';
import {
  BadRequestSchema,
  ErrorInfoSchema,
  RequestInfoSchema,
  RetryInfoSchema,
} from '../../gen/google/rpc/error_details_pb.ts';
import { StatusSchema } from '../../gen/google/rpc/status_pb.ts';
import { ErrorReason, ErrorReasonSchema, type ViolationReason } from '../../gen/rekey/v1/error_reason_pb.ts';
import {
  type ViolationReason as DomainViolationReason,
  type Reason,
  Refusal,
  type RefusalDetails,
} from '../../src/password/errors.ts';
import { toStatus } from '../../src/rpc/status.ts';

/** The codes of the contract. */
const codes: Record<Reason, Code> = {
  INVALID_REQUEST: Code.INVALID_ARGUMENT,
  SESSION_INVALID: Code.UNAUTHENTICATED,
  APP_NOT_ALLOWED: Code.PERMISSION_DENIED,
  USER_LOCKED: Code.PERMISSION_DENIED,
  USER_NOT_APPROVED: Code.PERMISSION_DENIED,
  SUPER_USER_REQUIRED: Code.PERMISSION_DENIED,
  OWN_PASSWORD_CHANGE_REQUIRED: Code.FAILED_PRECONDITION,
  USER_NOT_FOUND: Code.NOT_FOUND,
  TOO_MANY_ATTEMPTS: Code.RESOURCE_EXHAUSTED,
  PASSWORD_POLICY: Code.INVALID_ARGUMENT,
  OLD_PASSWORD_MISMATCH: Code.PERMISSION_DENIED,
  CONCURRENT_CHANGE: Code.ABORTED,
  IDEMPOTENCY_KEY_REUSED: Code.INVALID_ARGUMENT,
  OVERLOADED: Code.RESOURCE_EXHAUSTED,
  UNAVAILABLE: Code.UNAVAILABLE,
  DEADLINE_EXCEEDED: Code.DEADLINE_EXCEEDED,
  CANCELLED: Code.CANCELLED,
  CREDENTIALS_INVALID: Code.UNAUTHENTICATED,
  PASSWORD_CHANGE_REQUIRED: Code.FAILED_PRECONDITION,
};

/** True where the two unions have the same members: what does not compile here is a value that only one side knows. */
type Same<A, B> = [A] extends [B] ? ([B] extends [A] ? true : never) : never;
const reasonsAgree: Same<Reason | 'INTERNAL' | 'UNSPECIFIED', keyof typeof ErrorReason> = true;
const violationsAgree: Same<DomainViolationReason | 'UNSPECIFIED', keyof typeof ViolationReason> = true;

interface Details {
  readonly info: { reason: string; domain: string; metadata: Record<string, string> };
  readonly requestId: string;
  readonly violations: { field: string; reason: string; description: string }[];
  readonly retryMs: number | undefined;
  readonly types: string[];
}

function detailsOf(error: unknown, cid = 'the-cid'): Details & ReturnType<typeof toStatus> {
  const answer = toStatus(error, cid);
  const [bytes] = answer.metadata.get('grpc-status-details-bin') as [Buffer];
  const status = fromBinary(StatusSchema, bytes);
  assert.equal(status.code, answer.code);
  assert.equal(status.message, answer.details);
  const find = <T extends Message>(schema: GenMessage<T>) =>
    status.details.flatMap((any) => anyUnpack(any, schema) ?? [])[0];
  const info = find(ErrorInfoSchema);
  const retry = find(RetryInfoSchema);
  assert.ok(info);
  return {
    ...answer,
    info,
    requestId: find(RequestInfoSchema)?.requestId ?? '',
    violations: find(BadRequestSchema)?.fieldViolations ?? [],
    retryMs: retry?.retryDelay && durationMs(retry.retryDelay),
    types: status.details.map(({ typeUrl }) => typeUrl.replace(/.*[./]/, '')),
  };
}

const full: RefusalDetails = {
  violations: [
    { field: 'new_password', reason: 'TOO_SHORT', description: 'must have at least 8 characters' },
    { field: 'new_password', reason: 'COMMON', description: 'is common' },
  ],
  retryAfterMs: 1234,
  subStatus: ['E003002', 'E003001'],
  metadata: { min_length: '8' },
};

describe('reasons', () => {
  test('are the values of the enum in the contract, and each of those but two has a code', () => {
    assert.ok(reasonsAgree && violationsAgree);
    const known = Object.keys(ErrorReason).filter((name) => name !== 'UNSPECIFIED' && name !== 'INTERNAL');
    assert.deepEqual(Object.keys(codes).sort(), known.sort());
  });

  for (const [reason, code] of Object.entries(codes) as [Reason, Code][]) {
    test(`${reason} is ${Code[code]}`, () => {
      const answer = detailsOf(new Refusal(reason));
      assert.equal(answer.code, code);
      assert.equal(answer.reason, reason);
      assert.equal(answer.info.reason, reason);
      assert.ok(enumFromJson(ErrorReasonSchema, `ERROR_REASON_${reason}`));
      assert.match(reason, /^[A-Z][A-Z0-9_]+[A-Z0-9]$/);
      assert.ok(reason.length <= 63);
      assert.match(answer.details, /^[\x20-\x7e]+$/);
    });
  }
});

describe('details', () => {
  for (const reason of Object.keys(codes) as Reason[]) {
    test(`of ${reason} are each there once, small, and name the call`, () => {
      const answer = detailsOf(new Refusal(reason, full), 'c'.repeat(128));
      assert.deepEqual(answer.types, ['ErrorInfo', 'RequestInfo', 'BadRequest', 'RetryInfo']);
      assert.equal(answer.info.domain, 'rekey');
      assert.deepEqual(answer.info.metadata, {
        cid: 'c'.repeat(128),
        min_length: '8',
        sub_status: 'E003002,E003001',
      });
      assert.equal(answer.requestId, 'c'.repeat(128));
      assert.equal(answer.retryMs, 1234);
      assert.deepEqual(answer.metadata.get('grpc-retry-pushback-ms'), ['1234']);
      assert.deepEqual(
        answer.violations.map(({ field, reason, description }) => ({ field, reason, description })),
        full.violations,
      );
      const [bytes] = answer.metadata.get('grpc-status-details-bin') as [Buffer];
      assert.ok(bytes.length < 6000);
    });
  }

  test('are left out where there is nothing to tell', () => {
    const answer = detailsOf(new Refusal('SESSION_INVALID'));
    assert.deepEqual(answer.types, ['ErrorInfo', 'RequestInfo']);
    assert.deepEqual(answer.info.metadata, { cid: 'the-cid' });
    assert.deepEqual(answer.metadata.get('grpc-retry-pushback-ms'), []);
  });

  test('of the largest refusal there is fit into the trailers', () => {
    const violations = Array.from({ length: 12 }, () => ({
      field: 'idempotency-key',
      reason: 'MALFORMED' as const,
      description: 'must be 1 to 128 printable ASCII characters',
    }));
    const { metadata } = toStatus(new Refusal('INVALID_REQUEST', { ...full, violations }), 'c'.repeat(128));
    const [bytes] = metadata.get('grpc-status-details-bin') as [Buffer];
    assert.ok(bytes.toString('base64').length < 6000, String(bytes.length));
  });
});

describe('whatever is no refusal', () => {
  const canary = 'cAnArY';
  class Hostile extends Error {
    readonly sql = `UPDATE users SET password = '${canary}'`;
    readonly reason = 'OLD_PASSWORD_MISMATCH';
    readonly details = { metadata: { canary }, violations: [{ field: canary }], subStatus: [canary] };
    override get message(): string {
      return canary;
    }
  }

  for (const [what, error] of [
    ['an error with everything in it', new Hostile()],
    ['an error that looks like a gRPC one', Object.assign(new Error(canary), { code: 7, details: canary })],
    [
      'an SQL error',
      Object.assign(new Error(canary), { errno: 1062, sqlMessage: canary, sqlState: '23000' }),
    ],
    ['an error with a cause', new Error(canary, { cause: new Refusal('USER_LOCKED') })],
    ['an aggregate', new AggregateError([new Refusal('USER_LOCKED')], canary)],
    ['a string', canary],
    ['an object', { reason: 'USER_LOCKED', details: { metadata: { canary } } }],
    ['nothing', undefined],
    ['null', null],
  ] as [string, unknown][]) {
    test(`is INTERNAL and tells nothing: ${what}`, () => {
      const answer = detailsOf(error);
      assert.equal(answer.code, Code.INTERNAL);
      assert.equal(answer.reason, 'INTERNAL');
      assert.deepEqual(answer.types, ['ErrorInfo', 'RequestInfo']);
      assert.deepEqual({ ...answer.info.metadata }, { cid: 'the-cid' });
      const [bytes] = answer.metadata.get('grpc-status-details-bin') as [Buffer];
      assert.ok(!bytes.includes(canary));
      assert.ok(!JSON.stringify([answer.details, answer.metadata.getMap()]).includes(canary));
    });
  }

  test('is the same for all of them, byte for byte', () => {
    const answers = [new Hostile(), new Error('other'), 'text'].map((error) => detailsOf(error));
    const encoded = answers.map(({ metadata, details }) => [
      details,
      String(metadata.get('grpc-status-details-bin')),
    ]);
    assert.deepEqual(encoded[1], encoded[0]);
    assert.deepEqual(encoded[2], encoded[0]);
  });
});

test('the cause of a refusal stays inside', () => {
  const cause = new Error('cAnArY');
  for (const reason of Object.keys(codes) as Reason[]) {
    const { details, metadata } = toStatus(new Refusal(reason, { cause }), 'cid');
    const [bytes] = metadata.get('grpc-status-details-bin') as [Buffer];
    assert.ok(!bytes.includes('cAnArY') && !details.includes('cAnArY'));
  }
});
