//! The stand-in for the CUDA driver keeps its rules in every schedule, and the host's part of the pool does over it
//! what its header says: a program under sanitizers has a case for each (cuda/tests/standin_check.cpp).

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const CUDA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/cuda");
const FLAGS: [&str; 8] = [
    "-std=c++20",
    "-O1",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
    // Of loops that the kernels ask not to be unrolled.
    "-Wno-unknown-pragmas",
    "-fsanitize=address,undefined",
];

/// Whether there is a compiler; what is skipped without one is said.
fn compiler() -> bool {
    let there = Command::new("g++").arg("--version").output().is_ok_and(|output| output.status.success());
    if !there {
        eprintln!("standin: skipped {}: no g++ (apt-get install g++)", std::thread::current().name().unwrap_or("?"));
    }
    there
}

fn succeeded(output: &Output) {
    let text = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    assert!(output.status.success(), "{}{}", text[0], text[1]);
}

fn compile(arguments: &[&str], sources: &[&Path], out: &Path) {
    let mut compiler = Command::new("g++");
    compiler.args(FLAGS).arg("-fno-sanitize-recover=all").args(arguments).args(sources).arg("-o").arg(out);
    succeeded(&compiler.output().expect("g++ runs"));
}

#[test]
fn the_stand_in_keeps_its_rules_and_the_host_does_over_it_what_it_says() {
    if !compiler() {
        return;
    }
    let (cuda, out) = (Path::new(CUDA), PathBuf::from(env!("CARGO_TARGET_TMPDIR")));
    let (library, program) = (out.join("libstandin.so"), out.join("standin_check"));
    // Its kernels and the host's part have names in common: those of the library stay in it.
    compile(&["-shared", "-fPIC", "-fvisibility=hidden"], &[&cuda.join("tests/standin.cpp")], &library);
    compile(&[], &[&cuda.join("tests/standin_check.cpp"), &cuda.join("kv_host.cpp"), &library], &program);
    let images = cuda.join("prebuilt");
    succeeded(&Command::new(&program).arg(&library).arg(&images).output().expect("the program runs"));
}
