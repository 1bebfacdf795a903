import { create } from '@bufbuild/protobuf';
import { timestampFromDate } from '@bufbuild/protobuf/wkt';
import {
  type ChangePasswordRequest,
  type ChangePasswordRequestSchema,
  ChangePasswordResponseSchema,
} from '../../gen/rekey/v1/user_service_pb.ts';
import { type ChangePasswordDependencies, changePassword } from '../password/change_password.ts';
import type { Violation } from '../password/errors.ts';
import { required } from '../password/policy.ts';
import type { Handler } from './unary.ts';

const PASSWORD_EXPIRY_MAX_DAYS = 36_500;
const USER_ID_MAX = 64;

export function changePasswordHandler(
  deps: ChangePasswordDependencies,
): Handler<typeof ChangePasswordRequestSchema, typeof ChangePasswordResponseSchema> {
  return {
    takes: { ust: true, idempotencyKey: true },
    check: checkChangePassword,
    handle: async (call, request) => {
      const { passwordExpiresAt, sessionsEnded } = await changePassword(deps, call, {
        oldPassword: request.oldPassword,
        newPassword: request.newPassword,
        userId: request.userId,
        passwordExpiry: request.passwordExpiry,
        mustChange: request.mustChange,
        validateOnly: request.validateOnly ?? false,
      });
      return create(ChangePasswordResponseSchema, {
        ...(passwordExpiresAt ? { passwordExpiryTime: timestampFromDate(passwordExpiresAt) } : {}),
        sessionsEnded,
      });
    },
  };
}

function checkChangePassword({
  oldPassword,
  newPassword,
  userId,
  passwordExpiry,
}: ChangePasswordRequest): Violation[] {
  const violations: Violation[] = [];
  if (newPassword === '') violations.push(required('new_password'));
  if (oldPassword === '') violations.push(required('old_password', 'must not be empty where it is sent'));
  if (userId !== undefined && !isUserId(userId)) {
    const description = `must be 1 to ${USER_ID_MAX} printable ASCII characters`;
    violations.push({ field: 'user_id', reason: userId === '' ? 'REQUIRED' : 'MALFORMED', description });
  }
  if (passwordExpiry !== undefined && (passwordExpiry < 1 || passwordExpiry > PASSWORD_EXPIRY_MAX_DAYS)) {
    const description = `must be 1 to ${PASSWORD_EXPIRY_MAX_DAYS}`;
    violations.push({ field: 'password_expiry', reason: 'OUT_OF_RANGE', description });
  }
  return violations;
}

const isUserId = (userId: string) => userId.length <= USER_ID_MAX && /^[\x21-\x7e]+$/.test(userId);
