import type { Command } from 'commander';
import { type Config, ConfigError, isLoopback, loadConfig } from '../config.ts';
import { createLogger, type Logger } from '../log.ts';
import { serveMetrics } from '../metrics.ts';
import { checkSchema, SchemaMismatch } from '../mysql/migrate.ts';
import { type RunningServer, startServer } from '../server.ts';
import { CommandError, configPath, EXIT } from './context.ts';

export function addServeCommand(program: Command): void {
  program
    .command('serve')
    .description('serve calls until SIGTERM or SIGINT; SIGHUP reloads the policy')
    .option('--config <file>', 'configuration file (or REKEY_CONFIG)')
    .action(serve);
}

async function serve(options: { config?: string }): Promise<void> {
  const path = configPath(options);
  const config = loadConfig(path, process.env);
  const log = createLogger(config);
  for (const warning of warnings(config)) log.warn(warning);
  await refuseWrongSchema(config, log);

  const server = await startServer(config, log);
  const metrics =
    config.metrics_listen === ''
      ? undefined
      : await serveMetrics(server.metrics.registry, config.metrics_listen);
  log.info(
    {
      address: server.address,
      tls: describeTls(config),
      apps: config.apps,
      reflection: config.reflection,
      node: process.version,
    },
    `listening on ${server.address}`,
  );
  process.on('SIGHUP', () => reload(path, server, log));
  await stopped(config, server, log);
  metrics?.close();
}

/** What is allowed, and seldom meant. */
function warnings({ peppers, hash, database, databaseCa, listen, tlsFiles }: Config): string[] {
  return [
    ...(peppers.size > 0 && hash.pepper_key_id === ''
      ? ['hash.pepper_key_id is empty: new hashes are made without any of the pepper keys']
      : []),
    ...(databaseCa === undefined && !isLoopback(new URL(database.url).host)
      ? ['database.ca_file is empty: the connection to the database is not encrypted']
      : []),
    ...(tlsFiles === undefined && !isLoopback(listen)
      ? [
          'tls.plaintext is true: passwords reach this server unencrypted, unless something else encrypts them',
        ]
      : []),
  ];
}

const describeTls = ({ tlsFiles }: Config) => (tlsFiles ? (tlsFiles.clientCa ? 'mutual' : 'server') : 'off');

/** A schema that is not ours ends the start; a database that is away does not: it may come, and health tells. */
async function refuseWrongSchema(config: Config, log: Logger): Promise<void> {
  try {
    await checkSchema(config);
  } catch (error) {
    if (error instanceof SchemaMismatch) throw new CommandError(error.message);
    log.warn({ err: error }, 'the database does not answer yet; starting without it');
  }
}

function reload(path: string | undefined, server: RunningServer, log: Logger): void {
  try {
    server.reloadPolicy(loadConfig(path, process.env));
    log.info('policy reloaded');
  } catch (error) {
    const problems = error instanceof ConfigError ? error.problems : [String(error)];
    log.error({ problems }, 'policy not reloaded: the configuration has mistakes, the old policy stays');
  }
}

/** Waits for a signal and stops in good order; a second signal stops at once. */
async function stopped(config: Config, server: RunningServer, log: Logger): Promise<void> {
  const signal = await nextSignal();
  const graceMs = config.limits.shutdown_grace_seconds * 1000;
  log.info({ signal, graceMs }, 'stopping: no new calls, those under way finish');
  const forced = nextSignal().then((second) => {
    log.warn({ signal: second }, 'stopping at once');
    process.exit(EXIT.failed);
  });
  const { cutOff } = await Promise.race([server.stop(graceMs), forced]);
  if (cutOff > 0) log.warn({ cutOff }, 'the grace period is over: calls were cut off');
  log.info('stopped');
}

function nextSignal(): Promise<NodeJS.Signals> {
  return new Promise((resolve) => {
    const take = (signal: NodeJS.Signals) => {
      process.removeListener('SIGINT', take);
      process.removeListener('SIGTERM', take);
      resolve(signal);
    };
    process.on('SIGINT', take);
    process.on('SIGTERM', take);
  });
}
