import { create } from '@bufbuild/protobuf';
import { timestampFromDate } from '@bufbuild/protobuf/wkt';
import {
  type GetSessionRequestSchema,
  GetSessionResponseSchema,
  type LoginRequest,
  type LoginRequestSchema,
  LoginResponseSchema,
  type LogoutRequestSchema,
  LogoutResponseSchema,
} from '../../gen/rekey/v1/session_service_pb.ts';
import { isChangeDue } from '../password/authority.ts';
import type { Violation } from '../password/errors.ts';
import { required } from '../password/policy.ts';
import { describeSession, logIn, logOut, type SessionDependencies } from '../password/sessions.ts';
import type { Handler } from './unary.ts';

/** Code points; the column's width. */
const USERNAME_MAX = 128;

export const loginHandler = (
  deps: SessionDependencies,
): Handler<typeof LoginRequestSchema, typeof LoginResponseSchema> => ({
  takes: { ust: false, idempotencyKey: false },
  check: checkLogin,
  handle: async (call, { username, password, newPassword }) => {
    const outcome = await logIn(deps, call, { username, password, newPassword });
    return create(LoginResponseSchema, {
      ust: outcome.ust,
      sessionExpiryTime: timestampFromDate(outcome.sessionExpiresAt),
      userId: outcome.userId,
      ...(outcome.passwordExpiresAt
        ? { passwordExpiryTime: timestampFromDate(outcome.passwordExpiresAt) }
        : {}),
      passwordAboutToExpire: outcome.passwordAboutToExpire,
    });
  },
});

export const logoutHandler = (
  deps: SessionDependencies,
): Handler<typeof LogoutRequestSchema, typeof LogoutResponseSchema> => ({
  takes: { ust: true, idempotencyKey: false },
  check: () => [],
  handle: async (call) => {
    await logOut(deps, call);
    return create(LogoutResponseSchema);
  },
});

export const getSessionHandler = (
  deps: SessionDependencies,
): Handler<typeof GetSessionRequestSchema, typeof GetSessionResponseSchema> => ({
  takes: { ust: true, idempotencyKey: false },
  check: () => [],
  handle: async (call) => {
    const { user, expiresAt } = await describeSession(deps, call);
    return create(GetSessionResponseSchema, {
      userId: user.userId,
      username: user.username,
      superUser: user.isSuperUser,
      sessionExpiryTime: timestampFromDate(expiresAt),
      ...(user.passwordExpiresAt ? { passwordExpiryTime: timestampFromDate(user.passwordExpiresAt) } : {}),
      passwordChangeRequired: isChangeDue(user),
    });
  },
});

function checkLogin({ username, password, newPassword }: LoginRequest): Violation[] {
  const violations: Violation[] = [];
  if (username === '') violations.push(required('username'));
  else if (username.length > 2 * USERNAME_MAX || [...username].length > USERNAME_MAX) {
    const description = `must have at most ${USERNAME_MAX} characters`;
    violations.push({ field: 'username', reason: 'MALFORMED', description });
  }
  if (password === '') violations.push(required('password'));
  if (newPassword === '') violations.push(required('new_password', 'must not be empty where it is sent'));
  return violations;
}
