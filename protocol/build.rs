//! Generates the ttrpc types and service stubs from `proto/`.

use std::{env, fs, path::PathBuf};

fn main() {
    println!("cargo::rerun-if-changed=proto/agent.proto");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .inputs(["proto/agent.proto"])
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ttrpc_codegen::ProtobufCustomize::default().gen_mod_rs(false))
        .customize(ttrpc_codegen::Customize { async_all: true, ..Default::default() })
        .run()
        .expect("proto/agent.proto has to compile");
    // The generated files begin with inner attributes, which only a module of its own may have.
    fs::write(out.join("modules.rs"), "pub mod agent;\npub mod agent_ttrpc;\n")
        .expect("cargo's OUT_DIR is writable");
}
