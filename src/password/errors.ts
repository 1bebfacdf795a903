/**
 * The closed set of ways in which Rekey says no. `rpc/status.ts` has the only switch over it; whatever is thrown
 * and is not one of these is a defect, and the caller is told INTERNAL.
 */

/** Values of ErrorReason in `error_reason.proto`, without their prefix. */
export type Reason =
  | 'INVALID_REQUEST'
  | 'SESSION_INVALID'
  | 'APP_NOT_ALLOWED'
  | 'USER_LOCKED'
  | 'USER_NOT_APPROVED'
  | 'SUPER_USER_REQUIRED'
  | 'OWN_PASSWORD_CHANGE_REQUIRED'
  | 'USER_NOT_FOUND'
  | 'TOO_MANY_ATTEMPTS'
  | 'PASSWORD_POLICY'
  | 'OLD_PASSWORD_MISMATCH'
  | 'CONCURRENT_CHANGE'
  | 'IDEMPOTENCY_KEY_REUSED'
  | 'OVERLOADED'
  | 'UNAVAILABLE'
  | 'DEADLINE_EXCEEDED'
  | 'CANCELLED'
  | 'CREDENTIALS_INVALID'
  | 'PASSWORD_CHANGE_REQUIRED';

/** Values of ViolationReason in `error_reason.proto`, without their prefix. */
export type ViolationReason =
  | 'REQUIRED'
  | 'MALFORMED'
  | 'OUT_OF_RANGE'
  | 'DUPLICATE'
  | 'TOO_SHORT'
  | 'TOO_LONG'
  | 'TOO_WEAK'
  | 'REJECTED'
  | 'COMMON'
  | 'CONTAINS_USER_INFO'
  | 'SAME_AS_OLD';

/** One fault of one field or metadata key. The description never repeats the value. */
export interface Violation {
  readonly field: string;
  readonly reason: ViolationReason;
  readonly description: string;
}

/** What goes with a refusal, for the caller. */
export interface RefusalDetails {
  readonly violations?: readonly Violation[];
  /** When a retry may do better, from now. */
  readonly retryAfterMs?: number;
  /** Codes that earlier clients of this API switch on. */
  readonly subStatus?: readonly string[];
  /** Limits and the like, under the names that `error_reason.proto` documents. */
  readonly metadata?: Readonly<Record<string, string>>;
  readonly cause?: unknown;
}

/** Rekey says no, and why. */
export class Refusal extends Error {
  readonly reason: Reason;
  readonly details: RefusalDetails;
  constructor(reason: Reason, details: RefusalDetails = {}) {
    // An answer, not a defect: nobody asks where it was made, and an overloaded server makes many.
    const { stackTraceLimit } = Error;
    Error.stackTraceLimit = 0;
    super(reason, details.cause === undefined ? undefined : { cause: details.cause });
    Error.stackTraceLimit = stackTraceLimit;
    this.name = 'Refusal';
    this.reason = reason;
    this.details = details;
  }
}
