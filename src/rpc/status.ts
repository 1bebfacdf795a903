import { create, type Message, toBinary } from '@bufbuild/protobuf';
import type { GenMessage } from '@bufbuild/protobuf/codegenv2';
import { anyPack, durationFromMs } from '@bufbuild/protobuf/wkt';
import { status as Code, Metadata, type StatusObject } from '@grpc/grpc-js';
import {
  BadRequestSchema,
  ErrorInfoSchema,
  RequestInfoSchema,
  RetryInfoSchema,
} from '../../gen/google/rpc/error_details_pb.ts';
import { StatusSchema } from '../../gen/google/rpc/status_pb.ts';
import { type Reason, Refusal } from '../password/errors.ts';

const DOMAIN = 'rekey';

/** The only place where domain errors become gRPC ones; what is no refusal is INTERNAL, without its cause. */
export function toStatus(error: unknown, cid: string): StatusObject & { reason: string } {
  const refusal = error instanceof Refusal ? error : undefined;
  const reason = refusal?.reason ?? 'INTERNAL';
  const { code, message } = refusal ? describe(refusal.reason) : INTERNAL;
  const { violations = [], retryAfterMs, subStatus = [], metadata = {} } = refusal?.details ?? {};

  const detail = <T extends Message>(schema: GenMessage<T>, message: T) => anyPack(schema, message);
  const details = [
    detail(
      ErrorInfoSchema,
      create(ErrorInfoSchema, {
        reason,
        domain: DOMAIN,
        metadata: { cid, ...metadata, ...(subStatus.length > 0 ? { sub_status: subStatus.join(',') } : {}) },
      }),
    ),
    detail(RequestInfoSchema, create(RequestInfoSchema, { requestId: cid })),
  ];
  if (violations.length > 0) {
    const fieldViolations = violations.map(({ field, reason, description }) => ({
      field,
      reason,
      description,
    }));
    details.push(detail(BadRequestSchema, create(BadRequestSchema, { fieldViolations })));
  }
  const trailer = new Metadata();
  if (retryAfterMs !== undefined) {
    details.push(
      detail(RetryInfoSchema, create(RetryInfoSchema, { retryDelay: durationFromMs(retryAfterMs) })),
    );
    trailer.set('grpc-retry-pushback-ms', String(retryAfterMs));
  }
  trailer.set(
    'grpc-status-details-bin',
    Buffer.from(toBinary(StatusSchema, create(StatusSchema, { code, message, details }))),
  );
  return { code, details: message, metadata: trailer, reason };
}

const INTERNAL = {
  code: Code.INTERNAL,
  message: "internal error; the server's log has the cause under this cid",
};

function describe(reason: Reason): { code: Code; message: string } {
  switch (reason) {
    case 'INVALID_REQUEST':
      return { code: Code.INVALID_ARGUMENT, message: 'the request is malformed; see the field violations' };
    case 'PASSWORD_POLICY':
      return {
        code: Code.INVALID_ARGUMENT,
        message: 'the new password does not conform to the policy; see the field violations',
      };
    case 'IDEMPOTENCY_KEY_REUSED':
      return { code: Code.INVALID_ARGUMENT, message: 'the idempotency-key was used for another request' };
    case 'SESSION_INVALID':
      return { code: Code.UNAUTHENTICATED, message: 'the ust is missing or names no live session' };
    case 'CREDENTIALS_INVALID':
      return { code: Code.UNAUTHENTICATED, message: 'the username or the password is wrong' };
    case 'APP_NOT_ALLOWED':
      return { code: Code.PERMISSION_DENIED, message: 'the app is not one of those configured' };
    case 'USER_LOCKED':
      return { code: Code.PERMISSION_DENIED, message: 'the user is locked' };
    case 'USER_NOT_APPROVED':
      return { code: Code.PERMISSION_DENIED, message: 'the user is not approved' };
    case 'SUPER_USER_REQUIRED':
      return { code: Code.PERMISSION_DENIED, message: 'only a super-user may do this' };
    case 'OLD_PASSWORD_MISMATCH':
      return { code: Code.PERMISSION_DENIED, message: 'the old password is wrong' };
    case 'OWN_PASSWORD_CHANGE_REQUIRED':
      return {
        code: Code.FAILED_PRECONDITION,
        message: 'the own password has expired or must be changed first',
      };
    case 'PASSWORD_CHANGE_REQUIRED':
      return {
        code: Code.FAILED_PRECONDITION,
        message: 'the password has expired or must be changed: send new_password',
      };
    case 'USER_NOT_FOUND':
      return { code: Code.NOT_FOUND, message: 'there is no user with this user_id' };
    case 'TOO_MANY_ATTEMPTS':
      return { code: Code.RESOURCE_EXHAUSTED, message: 'too many wrong passwords; see when to retry' };
    case 'OVERLOADED':
      return {
        code: Code.RESOURCE_EXHAUSTED,
        message: 'the server is too busy to finish before the deadline; see when to retry',
      };
    case 'CONCURRENT_CHANGE':
      return {
        code: Code.ABORTED,
        message: 'the password, the session or the rights changed meanwhile; nothing was changed',
      };
    case 'UNAVAILABLE':
      return {
        code: Code.UNAVAILABLE,
        message: 'the outcome is not known or the database is away; retry with the same idempotency-key',
      };
    case 'DEADLINE_EXCEEDED':
      return { code: Code.DEADLINE_EXCEEDED, message: 'the deadline passed' };
    case 'CANCELLED':
      return { code: Code.CANCELLED, message: 'the caller went away' };
  }
}
