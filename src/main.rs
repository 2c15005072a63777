//! The program: hands the arguments to the command line and its status to the system.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmbackup::cli::main(std::env::args_os())
}
