import { availableParallelism } from 'node:os';

// As many threads as cores; libuv reads this when its pool is first used, so it stands before all other imports.
process.env.UV_THREADPOOL_SIZE ??= String(availableParallelism());

const { Command } = await import('commander');
const { addAdminCommands } = await import('./cli/admin.ts');
const { addClientCommands } = await import('./cli/client.ts');
const { CommandError, EXIT } = await import('./cli/context.ts');
const { addServeCommand } = await import('./cli/serve.ts');
const { ConfigError } = await import('./config.ts');
const { Refusal } = await import('./password/errors.ts');

const program = new Command('rekey')
  .description('changes passwords: a gRPC service and its tools')
  .showHelpAfterError('(add --help for the options)');
addServeCommand(program);
addAdminCommands(program);
addClientCommands(program);
program.commands.forEach(exitOnUsage);
exitOnUsage(program);

process.on('unhandledRejection', die);
process.on('uncaughtException', die);

try {
  await program.parseAsync();
  process.exit(EXIT.ok);
} catch (error) {
  die(error);
}

function exitOnUsage(command: InstanceType<typeof Command>): void {
  command.exitOverride((error) => process.exit(error.exitCode === 0 ? EXIT.ok : EXIT.usage));
  command.commands.forEach(exitOnUsage);
}

/** One readable line or paragraph for what people can mend; the stack only for defects. */
function die(error: unknown): never {
  if (error instanceof ConfigError) fail(error.message, EXIT.usage);
  if (error instanceof CommandError) fail(error.message, error.exitCode);
  if (error instanceof Refusal) {
    const violations = (error.details.violations ?? []).map(
      ({ field, reason, description }) => `\n  - ${field} ${description} (${reason})`,
    );
    const isAway = error.reason === 'UNAVAILABLE';
    const cause = isAway && error.cause instanceof Error ? `: ${messageOf(error.cause)}` : '';
    fail(
      `${isAway ? 'The database is away' : error.reason}${cause}${violations.join('')}`,
      isAway ? EXIT.tryAgain : EXIT.failed,
    );
  }
  const { name, code } = error as { name?: string; code?: string };
  if (name === 'ExitPromptError') fail('Interrupted; nothing was done.', EXIT.failed);
  if (code !== undefined) fail(messageOf(error as Error), EXIT.failed);
  fail((error as Error)?.stack ?? String(error), EXIT.failed);
}

function messageOf(error: Error): string {
  const inner = error instanceof AggregateError ? error.errors[0] : error;
  return inner.message || (inner as { code?: string }).code || inner.name;
}

function fail(message: string, exitCode: number): never {
  process.stderr.write(`${message}\n`);
  process.exit(exitCode);
}
