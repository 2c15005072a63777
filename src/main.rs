//! The program: hands the arguments to the command line and its status to the system.

fn main() {
    let status = vmbackup::cli::main(std::env::args_os());
    vmbackup::cli::leave(status)
}
