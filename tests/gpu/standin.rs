//! The stand-in for the CUDA driver, compiled and loaded into the process: for one test at a time.

use libloading::{Library, Symbol};
use std::ffi::{CString, c_char};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// When it does what it is given, as `Schedule` of the device that is the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    AtOnce = 0,
    Late = 1,
    Random = 2,
}

pub(crate) struct Standin {
    library: Library,
    path: PathBuf,
    _alone: MutexGuard<'static, ()>,
}

fn compiled() -> Option<&'static Path> {
    static PATH: OnceLock<Option<PathBuf>> = OnceLock::new();
    PATH.get_or_init(|| {
        if !Command::new("g++").arg("--version").output().is_ok_and(|output| output.status.success()) {
            return None;
        }
        // One for each program of tests: they run at the same time.
        let name = format!("standin-{}.so", env!("CARGO_CRATE_NAME"));
        let (cuda, out) = (concat!(env!("CARGO_MANIFEST_DIR"), "/cuda/tests/standin.cpp"), env!("CARGO_TARGET_TMPDIR"));
        let path = Path::new(out).join(name);
        let flags = ["-std=c++20", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"];
        let mut compiler = Command::new("g++");
        compiler.args(flags).arg("-Wno-unknown-pragmas").arg(cuda).arg("-o").arg(&path);
        let output = compiler.output().expect("g++ runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Some(path)
    })
    .as_deref()
}

impl Standin {
    /// As it is when it is loaded, but for when it does what. `None`: there is no compiler, and that is said.
    pub(crate) fn new(when: When, seed: u64) -> Option<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(path) = compiled() else {
            let test = std::thread::current();
            eprintln!("gpu: skipped {}: no g++ (apt-get install g++)", test.name().unwrap_or("?"));
            return None;
        };
        // SAFETY: loading it runs what makes its own variables, and nothing else.
        let library = unsafe { Library::new(path) }.expect("it was compiled");
        let standin = Self { library, path: path.into(), _alone: alone };
        // SAFETY: as declared in cuda/tests/standin.h; no other test is in a call.
        unsafe { standin.function::<unsafe extern "C" fn()>("standin_reset")() };
        standin.set("schedule", when as u64);
        standin.set("seed", seed);
        Some(standin)
    }

    /// Its library.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// A function of it, of that type.
    pub(crate) fn function<T: Copy>(&self, name: &str) -> T {
        // SAFETY: whoever asks names the type that the header, or the driver's, has for it.
        let found: Symbol<'_, T> = unsafe { self.library.get(name.as_bytes()) }.expect("it is exported");
        *found
    }

    pub(crate) fn set(&self, what: &str, value: u64) {
        let name = CString::new(what).expect("no zeros");
        // SAFETY: as declared in cuda/tests/standin.h.
        let known = unsafe {
            self.function::<unsafe extern "C" fn(*const c_char, u64) -> i32>("standin_set")(name.as_ptr(), value)
        };
        assert_eq!(known, 0, "{what}");
    }

    /// The nth call from now on ends with a code.
    pub(crate) fn fail(&self, call: &str, nth: u64, code: i32) {
        let name = CString::new(call).expect("no zeros");
        // SAFETY: as declared there.
        unsafe {
            self.function::<unsafe extern "C" fn(*const c_char, u64, i32)>("standin_fail")(name.as_ptr(), nth, code);
        }
    }

    pub(crate) fn calls(&self, call: &str) -> u64 {
        let name = CString::new(call).expect("no zeros");
        // SAFETY: as declared there.
        unsafe { self.function::<unsafe extern "C" fn(*const c_char) -> u64>("standin_calls")(name.as_ptr()) }
    }

    fn told(&self, by: &str) -> (usize, String) {
        let mut text = vec![0u8; 4096];
        // SAFETY: as declared there; the text has so many bytes.
        let count = unsafe {
            self.function::<unsafe extern "C" fn(*mut c_char, usize) -> usize>(by)(text.as_mut_ptr().cast(), text.len())
        };
        let end = text.iter().position(|&byte| byte == 0).unwrap_or(text.len());
        (count, String::from_utf8_lossy(&text[..end]).into_owned())
    }

    /// No rule was broken up to now.
    pub(crate) fn assert_clean(&self) {
        let (broken, text) = self.told("standin_report");
        assert_eq!(broken, 0, "{text}");
    }

    /// Nor is anything left that was made.
    pub(crate) fn assert_given_back(&self) {
        self.assert_clean();
        let (left, text) = self.told("standin_leaks");
        assert_eq!(left, 0, "{text}");
    }
}
