import type { Command } from 'commander';
import { loadConfig } from '../config.ts';
import { type AuditRecord, auditedTransaction, insertAuditRecord, listAuditRecords } from '../mysql/audit.ts';
import { migrate } from '../mysql/migrate.ts';
import type { Executor } from '../mysql/pool.ts';
import { endSession, findSessionOwner, insertSession, listSessions, newToken } from '../mysql/sessions.ts';
import {
  type Approval,
  findUser,
  findUserByName,
  insertUser,
  listUsers,
  lockUser,
  normaliseUsername,
  setApproval,
  setLocked,
  setSuperUser,
  type User,
} from '../mysql/users.ts';
import { normalise, Policy } from '../password/policy.ts';
import { createHasher } from '../server.ts';
import {
  asOperator,
  CommandError,
  configPath,
  EXIT,
  type Operator,
  printJson,
  printTable,
} from './context.ts';
import { newSecret, secretsFrom } from './secrets.ts';

const PAGE = 1000;
/** IDs are; MySQL compares nothing else with them. */
const ASCII = /^[\x20-\x7e]*$/;
const ER_DUP_ENTRY = 1062;

interface Common {
  config?: string;
  cid?: string;
  json?: boolean;
}

/** The operator's commands: they work on the database itself, and each act of theirs is audited. */
export function addAdminCommands(program: Command): void {
  const command = (parent: Command, nameAndArguments: string, description: string) =>
    parent
      .command(nameAndArguments)
      .description(description)
      .option('--config <file>', 'configuration file (or REKEY_CONFIG)');
  const act = (parent: Command, nameAndArguments: string, description: string) =>
    command(parent, nameAndArguments, description).option('--cid <cid>', 'correlation ID for the audit log');
  const query = (parent: Command, nameAndArguments: string, description: string) =>
    command(parent, nameAndArguments, description).option('--json', 'a JSON line for each');

  command(program, 'migrate', 'bring the database schema up to date').action(async (options: Common) => {
    await migrate(loadConfig(configPath(options), process.env), (line) => process.stderr.write(`${line}\n`));
  });

  const user = program.command('user').description('people with passwords');
  act(user, 'create <name>', 'create a user; prints the user ID')
    .option('--super-user', 'who may change the passwords of others')
    .option('--password-stdin', 'read the password from standard input')
    .option('--email <address>', 'e-mail address', '')
    .option('--display-name <name>', 'full name', '')
    .option('--must-change', 'must set another password at the first log-in')
    .option('--pending', 'not approved yet')
    .option('--json', 'print {"user_id": …}')
    .action(createUser);
  query(user, 'list', 'list users').action(async (options: Common) => {
    await asOperator(options, async ({ database, wait }) => {
      for (let after = ''; ; ) {
        const users = await listUsers(database.statements(wait), after, PAGE);
        if (options.json) for (const each of users) printJson(describe(each));
        else if (after === '' || users.length > 0) {
          printTable(
            ['USER ID', 'NAME', 'FLAGS', 'PASSWORD EXPIRES'],
            users.map((each) => [each.userId, each.username, flags(each), expiry(each)]),
          );
        }
        if (users.length < PAGE) return;
        after = users.at(-1)?.username ?? '';
      }
    });
  });
  query(user, 'show <name-or-id>', 'show a user').action(async (name: string, options: Common) => {
    await asOperator(options, async (operator) => {
      const found = describe(await requireUser(operator, name));
      if (options.json) printJson(found);
      else
        printTable(
          ['KEY', 'VALUE'],
          Object.entries(found).map(([key, value]) => [key, String(value ?? '-')]),
        );
    });
  });
  const changing = (
    name: string,
    description: string,
    action: string,
    change: (tx: Executor, userId: string) => Promise<boolean>,
  ) =>
    act(user, `${name} <name-or-id>`, description).action(async (nameOrId: string, options: Common) => {
      await asOperator(options, async (operator) => {
        const { userId, username } = await requireUser(operator, nameOrId);
        await audited(operator, action, userId, {}, async (tx) => {
          if (!(await change(tx, userId))) throw new CommandError(`${username} was deleted meanwhile.`);
        });
        process.stderr.write(`${username}: done\n`);
      });
    });
  const approving = (approval: Approval) => (tx: Executor, userId: string) =>
    setApproval(tx, userId, approval);
  changing('lock', 'refuse everything to a user', 'LockUser', (tx, userId) => setLocked(tx, userId, true));
  changing('unlock', 'undo a lock', 'UnlockUser', (tx, userId) => setLocked(tx, userId, false));
  changing('approve', 'approve an account', 'ApproveUser', approving('approved'));
  changing('reject', 'reject an account', 'RejectUser', approving('rejected'));
  changing('promote', 'make a super-user', 'PromoteUser', (tx, userId) => setSuperUser(tx, userId, true));
  changing('demote', 'make a regular user', 'DemoteUser', (tx, userId) => setSuperUser(tx, userId, false));

  const session = program.command('session').description("people's sessions");
  act(session, 'open <name-or-id>', "open a session in a user's name; prints its token (UST)")
    .requiredOption('--app <app>', 'application it is opened for')
    .option('--ttl <duration>', 'how long it lasts, e.g. 90s, 30m, 8h, 7d (default: as configured)')
    .option('--json', 'print {"ust": …, "expires_at": …}')
    .action(openSession);
  query(session, 'list [name-or-id]', 'list the live sessions, newest first').action(
    async (name: string | undefined, options: Common) => {
      await asOperator(options, async (operator) => {
        const userId = name === undefined ? undefined : (await requireUser(operator, name)).userId;
        const sessions = await listSessions(operator.database.statements(operator.wait), userId, PAGE);
        if (options.json) {
          for (const each of sessions) {
            printJson({
              session_id: each.sessionId,
              user_id: each.userId,
              username: each.username,
              app: each.app,
              remote_addr: each.remoteAddress,
              opened_at: each.openedAt,
              expires_at: each.expiresAt,
            });
          }
          return;
        }
        printTable(
          ['SESSION', 'USER', 'APP', 'FROM', 'OPENED', 'EXPIRES'],
          sessions.map((each) => [
            String(each.sessionId),
            each.username,
            each.app,
            each.remoteAddress,
            each.openedAt.toISOString(),
            each.expiresAt.toISOString(),
          ]),
        );
        if (sessions.length === PAGE)
          process.stderr.write(`(the newest ${PAGE}; name a user to see all of his or hers)\n`);
      });
    },
  );
  act(session, 'end <session-id>', 'end a session').action(async (id: string, options: Common) => {
    if (!/^\d{1,15}$/.test(id))
      throw new CommandError('A session ID is a number; see "rekey session list".', EXIT.usage);
    await asOperator(options, async (operator) => {
      const owner = await findSessionOwner(operator.database.statements(operator.wait), Number(id));
      if (owner === undefined) throw new CommandError(`There is no session ${id}.`);
      await audited(operator, 'EndSession', owner, { session_id: Number(id) }, async (tx) => {
        if (!(await endSession(tx, Number(id)))) throw new CommandError(`Session ${id} is over already.`);
      });
    });
  });

  const audit = program.command('audit').description('who did what, when and from where');
  query(audit, 'list', 'list audit records, oldest first')
    .option('--cid <cid>', 'of this correlation ID')
    .option('--user <name-or-id>', 'by or about this user')
    .option('--since <time>', 'from then on: an ISO 8601 time, or a duration ago such as 30m, 7d')
    .option('--limit <n>', 'the newest so many', '200')
    .action(listAudit);
}

async function createUser(
  name: string,
  options: Common & {
    superUser?: boolean;
    passwordStdin?: boolean;
    email: string;
    displayName: string;
    mustChange?: boolean;
    pending?: boolean;
  },
): Promise<void> {
  const username = normaliseUsername(name);
  if (!/^[^\s\p{C}](?:[^\p{C}]{0,126}[^\s\p{C}])?$/u.test(username)) {
    throw new CommandError(
      'A name has 1 to 128 characters, no control characters, and no space around it.',
      EXIT.usage,
    );
  }
  await asOperator(options, async (operator) => {
    const { config, database, wait } = operator;
    const password = normalise(
      await newSecret(secretsFrom(options.passwordStdin === true), `Password of ${username}`),
    );
    const { email, displayName } = options;
    new Policy({ ...config.policy, rejectWords: config.rejectWords }).check(password, {
      username,
      displayName,
      email,
      oldPassword: undefined,
    });
    const hasher = await createHasher(config);
    const passwordHash = await hasher.hash(password, wait);
    try {
      const userId = await auditedTransaction(database, wait, async (tx) => {
        const userId = await insertUser(tx, {
          username,
          displayName,
          email,
          isSuperUser: options.superUser === true,
          approval: options.pending ? 'pending' : 'approved',
          passwordHash,
          passwordExpiryDays: config.policy.expiry_days,
          mustChange: options.mustChange === true,
        });
        const record = await insertAuditRecord(tx, operator.call, {
          action: 'CreateUser',
          outcome: 'ok',
          reason: '',
          actorUserId: null,
          targetUserId: userId,
          request: { super_user: options.superUser === true, must_change: options.mustChange === true },
        });
        return { outcome: userId, record };
      });
      if (options.json) printJson({ user_id: userId });
      else process.stdout.write(`${userId}\n`);
    } catch (error) {
      if ((error as { errno?: number }).errno === ER_DUP_ENTRY)
        throw new CommandError(`There is a user ${username} already.`);
      throw error;
    }
  });
}

async function openSession(nameOrId: string, options: Common & { app: string; ttl?: string }): Promise<void> {
  await asOperator(options, async (operator) => {
    const { config } = operator;
    if (!config.apps.includes(options.app)) {
      throw new CommandError(
        `${options.app} is not one of the configured apps (${config.apps.join(', ')}).`,
        EXIT.usage,
      );
    }
    const lifetimeSeconds =
      options.ttl === undefined ? config.session.lifetime_seconds : parseDuration(options.ttl);
    const { userId } = await requireUser(operator, nameOrId);
    const ust = newToken();
    const { app } = options;
    const expiresAt = await audited(
      operator,
      'OpenSession',
      userId,
      { app, ttl: lifetimeSeconds },
      async (tx) => {
        const locked = await lockUser(tx, userId);
        if (!locked) throw new CommandError(`${nameOrId} was deleted meanwhile.`);
        const expiresAt = new Date(locked.now.getTime() + lifetimeSeconds * 1000);
        await insertSession(tx, {
          token: ust,
          userId,
          app,
          remoteAddress: 'local',
          openedAt: locked.now,
          expiresAt,
        });
        return expiresAt;
      },
    );
    if (options.json) printJson({ ust, expires_at: expiresAt.toISOString() });
    else process.stdout.write(`${ust}\n`);
  });
}

async function listAudit(options: Common & { user?: string; since?: string; limit: string }): Promise<void> {
  if (!/^\d{1,6}$/.test(options.limit)) throw new CommandError('--limit takes a whole number.', EXIT.usage);
  if (!ASCII.test(options.cid ?? '')) throw new CommandError('--cid takes printable ASCII.', EXIT.usage);
  await asOperator(options, async (operator) => {
    const records = await listAuditRecords(operator.database.statements(operator.wait), {
      limit: Number(options.limit),
      ...(options.cid === undefined ? {} : { cid: options.cid }),
      ...(options.since === undefined ? {} : { since: parseSince(options.since) }),
      ...(options.user === undefined ? {} : { userId: (await requireUser(operator, options.user)).userId }),
    });
    if (options.json) for (const record of records) printJson(toJson(record));
    else {
      printTable(
        ['TIME', 'CID', 'ACTION', 'OUTCOME', 'ACTOR', 'TARGET', 'APP', 'FROM', 'REQUEST'],
        records.map((record) => [
          record.at,
          record.cid,
          record.action,
          record.reason === '' ? record.outcome : `${record.outcome}: ${record.reason}`,
          record.actorUserId ?? '-',
          record.targetUserId ?? '-',
          record.app,
          [
            record.remoteAddress,
            record.peerAddress && `via ${record.peerAddress}`,
            record.claimedAddress && `claimed ${record.claimedAddress}`,
          ]
            .filter(Boolean)
            .join(' '),
          JSON.stringify(record.request),
        ]),
      );
    }
  });
}

const toJson = (record: AuditRecord) => ({
  at: record.at,
  cid: record.cid,
  action: record.action,
  outcome: record.outcome,
  reason: record.reason,
  actor_user_id: record.actorUserId,
  target_user_id: record.targetUserId,
  app: record.app,
  remote_addr: record.remoteAddress,
  peer_addr: record.peerAddress,
  claimed_addr: record.claimedAddress,
  request: record.request,
});

/** An operator's act and its audit record in one transaction. */
async function audited<T>(
  { database, wait, call }: Operator,
  action: string,
  targetUserId: string,
  request: Record<string, string | number | boolean>,
  work: (tx: Executor) => Promise<T>,
): Promise<T> {
  const event = { action, outcome: 'ok' as const, reason: '', actorUserId: null, targetUserId, request };
  return await auditedTransaction(database, wait, async (tx) => {
    await lockUser(tx, targetUserId);
    return { outcome: await work(tx), record: await insertAuditRecord(tx, call, event) };
  });
}

async function requireUser({ database, wait }: Operator, nameOrId: string): Promise<User> {
  const statements = database.statements(wait);
  const user =
    (await findUserByName(statements, nameOrId)) ??
    (ASCII.test(nameOrId) ? await findUser(statements, nameOrId) : undefined);
  if (!user) throw new CommandError(`There is no user ${nameOrId}.`);
  return user;
}

const flags = (user: User) =>
  [
    user.isSuperUser && 'super-user',
    user.isLocked && 'locked',
    user.approval !== 'approved' && user.approval,
    user.mustChange && 'must-change',
    user.passwordHasExpired && 'expired',
  ]
    .filter(Boolean)
    .join(',') || '-';

const expiry = (user: User) => user.passwordExpiresAt?.toISOString() ?? 'never';

const describe = (user: User) => ({
  user_id: user.userId,
  username: user.username,
  display_name: user.displayName,
  email: user.email,
  super_user: user.isSuperUser,
  locked: user.isLocked,
  approval: user.approval,
  must_change: user.mustChange,
  password_expires_at: user.passwordExpiresAt?.toISOString() ?? null,
  password_expired: user.passwordHasExpired,
});

const UNIT_SECONDS: Record<string, number> = { s: 1, m: 60, h: 3600, d: 86_400 };
const DURATION_MAX_SECONDS = 3650 * 86_400;

function parseDuration(value: string): number {
  const match = /^(\d{1,9})([smhd])$/.exec(value);
  const seconds = Number(match?.[1]) * (UNIT_SECONDS[match?.[2] ?? ''] ?? Number.NaN);
  if (!(seconds >= 1 && seconds <= DURATION_MAX_SECONDS)) {
    throw new CommandError(`${value} is not a duration; write e.g. 90s, 30m, 8h or 7d.`, EXIT.usage);
  }
  return seconds;
}

function parseSince(value: string): Date {
  const time = /^\d+[smhd]$/.test(value)
    ? new Date(Date.now() - parseDuration(value) * 1000)
    : new Date(value);
  if (Number.isNaN(time.getTime()))
    throw new CommandError(`${value} is neither a time nor a duration.`, EXIT.usage);
  return time;
}
