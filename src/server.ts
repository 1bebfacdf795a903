import { readFileSync } from 'node:fs';
import { fromBinary, toBinary } from '@bufbuild/protobuf';
import { FileDescriptorProtoSchema, FileDescriptorSetSchema } from '@bufbuild/protobuf/wkt';
import {
  type handleServerStreamingCall,
  Server,
  ServerCredentials,
  type ServiceDefinition,
  type UntypedServiceImplementation,
} from '@grpc/grpc-js';
import { ReflectionService } from '@grpc/reflection';
import { HealthImplementation, service as healthService } from 'grpc-health-check';
import { SessionService } from '../gen/rekey/v1/session_service_pb.ts';
import { UserService } from '../gen/rekey/v1/user_service_pb.ts';
import { Wait } from './call.ts';
import type { Config } from './config.ts';
import type { Logger } from './log.ts';
import { createMetrics, type Metrics } from './metrics.ts';
import { removeExpired } from './mysql/cleaning.ts';
import { checkSchema } from './mysql/migrate.ts';
import { Database } from './mysql/pool.ts';
import type { ChangeSettings } from './password/change_password.ts';
import { chooseEngine } from './password/engine.ts';
import { Hasher } from './password/hasher.ts';
import { Policy } from './password/policy.ts';
import { lowerPoolPriority } from './password/pool_priority.ts';
import type { LoginSettings } from './password/sessions.ts';
import { Slots } from './password/slots.ts';
import { bodyTimeout } from './rpc/body_timeout.ts';
import { guardConnections } from './rpc/connections.ts';
import { getSessionHandler, loginHandler, logoutHandler } from './rpc/session_service.ts';
import { type Edge, unary } from './rpc/unary.ts';
import { changePasswordHandler } from './rpc/user_service.ts';

/** The services whose health is told, each by its name, and all of them as ''. */
const SERVICES = ['', UserService.typeName, SessionService.typeName];
/** The only method whose calls last. */
const HEALTH_WATCH = '/grpc.health.v1.Health/Watch';
const HEALTH_INTERVAL_MS = 1_000;
const HEALTH_TIMEOUT_MS = 2_000;
const SWEEP_TIMEOUT_MS = 600_000;

export interface RunningServer {
  readonly metrics: Metrics;
  readonly hasher: Hasher;
  /** host:port, the port being the real one where 0 was asked for. */
  readonly address: string;
  /** Takes over the policy of another configuration, from the next call on. */
  reloadPolicy(config: Config): void;
  /** NOT_SERVING, no new connections, the calls under way finish; after the grace period they are cut off. */
  stop(graceMs: number): Promise<{ cutOff: number }>;
}

/** All the wiring. */
export async function startServer(config: Config, log: Logger): Promise<RunningServer> {
  const hasher = await createHasher(config);
  lowerPoolPriority();
  log.info({ slots: config.slots, hashMs: Math.round(hasher.slots.hashMs) }, `hashing with ${hasher.engine}`);
  const database = new Database(config);
  const metrics = createMetrics(hasher.slots);

  let policy = new Policy(policyRules(config));
  let settings = settingsOf(config);
  const common = { database, hasher, policy: () => policy };
  const users = { ...common, settings: () => settings.change };
  const sessions = { ...common, settings: () => settings.login };
  const edge: Edge = { config, log, metrics, underWay: new Set() };

  const { limits } = config;
  const server = new Server({
    interceptors: [bodyTimeout(limits.call_timeout_ms)],
    // Counters of its own for every call and connection, which nothing here serves.
    'grpc.enable_channelz': 0,
    'grpc.max_receive_message_length': limits.message_bytes,
    'grpc.max_concurrent_streams': limits.streams_per_connection,
    'grpc.max_connection_age_ms': limits.connection_age_seconds * 1000,
    'grpc.max_connection_age_grace_ms': 2 * limits.call_timeout_ms,
    'grpc.keepalive_time_ms': limits.keepalive_seconds * 1000,
    'grpc.keepalive_timeout_ms': limits.keepalive_seconds * 1000,
  });
  guardConnections(server, config, log, new Set([HEALTH_WATCH]));
  const methods = [
    unary(edge, UserService.method.changePassword, changePasswordHandler(users)),
    unary(edge, SessionService.method.login, loginHandler(sessions)),
    unary(edge, SessionService.method.logout, logoutHandler(sessions)),
    unary(edge, SessionService.method.getSession, getSessionHandler(sessions)),
  ];
  for (const { definition, implementation } of methods) {
    const service: ServiceDefinition = { [definition.path]: definition };
    server.addService(service, { [definition.path]: implementation });
  }
  const health = new HealthImplementation(
    Object.fromEntries(SERVICES.map((name) => [name, 'NOT_SERVING' as const])),
  );
  addHealth(server, health);
  if (config.reflection) reflection().addToServer(server);

  const port = await new Promise<number>((resolve, reject) =>
    server.bindAsync(config.listen, credentials(config), (error, bound) =>
      error ? reject(error) : resolve(bound),
    ),
  );
  const stopWatching = watchDatabase(config, database, health, log);
  const stopCleaning = cleanUp(config, database, log);

  return {
    metrics,
    hasher,
    address: config.listen.replace(/:\d+$/, `:${port}`),
    reloadPolicy: (next) => {
      policy = new Policy(policyRules(next));
      settings = settingsOf(next);
    },
    stop: async (graceMs) => {
      const background = Promise.all([stopWatching(), stopCleaning()]);
      for (const name of SERVICES) health.setStatus(name, 'NOT_SERVING');
      const cutOff = await drain(server, edge.underWay, graceMs);
      await background;
      await Promise.race([database.close(), new Promise((resolve) => setTimeout(resolve, 1000).unref())]);
      return { cutOff };
    },
  };
}

/** The hasher that the configuration asks for, its first estimate of a hash's time measured. */
export async function createHasher(config: Config): Promise<Hasher> {
  const { engine, reason } = await chooseEngine(config.hash.engine);
  const { memory_kib, iterations, parallelism, pepper_key_id, queue_length } = config.hash;
  const parameters = { memoryKib: memory_kib, iterations, parallelism };
  const start = performance.now();
  await engine.argon2id('', Buffer.alloc(16), undefined, 32, parameters);
  const slots = new Slots(config.slots, queue_length, performance.now() - start);
  return new Hasher(
    engine,
    reason,
    { ...parameters, peppers: config.peppers, pepperId: pepper_key_id || undefined },
    slots,
  );
}

const policyRules = (config: Config) => ({ ...config.policy, rejectWords: config.rejectWords });

/** What the methods go by, beside the policy. */
function settingsOf({ apps, policy, guard, session }: Config): {
  change: ChangeSettings;
  login: LoginSettings;
} {
  const common = { apps: new Set(apps), expiryDays: policy.expiry_days };
  return {
    change: {
      ...common,
      mustChangeAfterSuperUser: policy.must_change_after_super_user,
      guard: { limit: guard.old_password_attempts, windowSeconds: guard.window_seconds },
    },
    login: {
      ...common,
      lifetimeSeconds: session.lifetime_seconds,
      expiryWarningDays: policy.expiry_warning_days,
      guard: {
        perAccount: guard.login_attempts,
        perAddress: guard.login_attempts_per_address,
        windowSeconds: guard.window_seconds,
      },
    },
  };
}

function credentials({ tlsFiles }: Config): ServerCredentials {
  if (!tlsFiles) return ServerCredentials.createInsecure();
  const { certificate, key, clientCa } = tlsFiles;
  return ServerCredentials.createSsl(
    clientCa ?? null,
    [{ private_key: key, cert_chain: certificate }],
    clientCa !== undefined,
  );
}

/** The library keeps every name that was ever watched: names of no service of ours are one and the same to it. */
function addHealth(server: Server, health: HealthImplementation): void {
  const register = (definition: ServiceDefinition, methods: UntypedServiceImplementation) => {
    const watch = methods.watch as handleServerStreamingCall<{ service: string }, unknown>;
    server.addService(definition, {
      ...methods,
      watch: (call: Parameters<typeof watch>[0]) => {
        if (!SERVICES.includes(call.request.service)) call.request.service = 'unknown';
        watch(call);
      },
    });
  };
  health.addToServer({ addService: register } as Server);
}

/** Reflection of the descriptors just as `buf build` made them, comments included. */
function reflection(): ReflectionService {
  const { file } = fromBinary(
    FileDescriptorSetSchema,
    readFileSync(new URL('../gen/rekey.binpb', import.meta.url)),
  );
  const fileDescriptorProtos = file.map((descriptor) =>
    Buffer.from(toBinary(FileDescriptorProtoSchema, descriptor)),
  );
  const ours = { format: '', type: {}, fileDescriptorProtos };
  // The library looks for descriptors in the values that it is given, and a service's methods hold none.
  const { requestType: health } = healthService.Check as unknown as { requestType: typeof ours };
  return new ReflectionService({ ours, health } as never);
}

/** Tells SERVING while the database answers and has the schema that this program works with. */
function watchDatabase(
  config: Config,
  database: Database,
  health: HealthImplementation,
  log: Logger,
): () => Promise<void> {
  let isServing: boolean | undefined;
  let isStopped = false;
  let timer: NodeJS.Timeout | undefined;
  const look = async () => {
    let problem: unknown;
    try {
      if (isServing) await database.ping(HEALTH_TIMEOUT_MS);
      else await checkSchema(config);
    } catch (error) {
      problem = error;
    }
    if (isStopped) return;
    if ((problem === undefined) !== isServing) {
      isServing = problem === undefined;
      for (const name of SERVICES) health.setStatus(name, isServing ? 'SERVING' : 'NOT_SERVING');
      if (isServing) log.info('serving: the database answers');
      else
        log.error({ err: problem }, 'not serving: the database does not answer; trying again every second');
    }
    timer = setTimeout(() => {
      running = look();
    }, HEALTH_INTERVAL_MS);
  };
  let running = look();
  return async () => {
    isStopped = true;
    clearTimeout(timer);
    await running;
  };
}

/** Removes what is past its retention, now and then; one replica at a time does it. */
function cleanUp({ retention, guard }: Config, database: Database, log: Logger): () => Promise<void> {
  const stop = new AbortController();
  const sweep = async () => {
    try {
      const wait = new Wait(stop.signal, performance.now() + SWEEP_TIMEOUT_MS);
      await database.exclusively('rekey_cleaning_', wait, async (statements) => {
        const removed = await removeExpired(
          statements,
          {
            sessionDays: retention.session_days,
            idempotencyHours: retention.idempotency_hours,
            loginAttemptSeconds: guard.window_seconds,
            auditDays: retention.audit_days,
          },
          stop.signal,
        );
        if (Object.values(removed).some((rows) => rows > 0))
          log.info({ removed }, 'removed what was past its retention');
      });
    } catch (error) {
      if (!stop.signal.aborted)
        log.warn({ err: error }, 'removing what is past its retention failed; trying again later');
    }
    if (!stop.signal.aborted) schedule();
  };
  let timer: NodeJS.Timeout | undefined;
  let running = Promise.resolve();
  const schedule = () => {
    // Replicas that were started together drift apart.
    timer = setTimeout(
      () => {
        running = sweep();
      },
      retention.sweep_seconds * 1000 * (0.5 + Math.random()),
    );
  };
  schedule();
  return async () => {
    stop.abort();
    clearTimeout(timer);
    await running;
  };
}

async function drain(server: Server, underWay: ReadonlySet<Promise<void>>, graceMs: number): Promise<number> {
  let timer: NodeJS.Timeout | undefined;
  const closed = new Promise<void>((resolve) => server.tryShutdown(() => resolve()));
  const finished = closed.then(() => Promise.allSettled(underWay)).then(() => 0);
  const graceOver = new Promise<number>((resolve) => {
    timer = setTimeout(() => {
      const cutOff = underWay.size;
      server.forceShutdown();
      resolve(cutOff);
    }, graceMs);
  });
  const cutOff = await Promise.race([finished, graceOver]);
  clearTimeout(timer);
  return cutOff;
}
