//! A built kernel program as a file: what must be in it, and how two of them differ.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow};
use object::{
    Object as _, ObjectSection as _, ObjectSymbol as _, SymbolKind,
    build::elf::{Builder, SectionData},
};

use crate::process::{command, output, which};

/// One object, and what it is useless without.
pub(crate) struct Required {
    /// Name of the binary in package `capture-ebpf`.
    pub(crate) name: &'static str,
    /// Programs: symbol, section.
    programs: &'static [(&'static str, &'static str)],
    /// Maps: symbols in section `maps`, or `.maps` where BTF describes them.
    maps: &'static [&'static str],
}

/// Every object that is committed.
pub(crate) const OBJECTS: &[Required] = &[
    Required {
        name: "capture",
        programs: &[
            ("exclusive", "xdp.frags"),
            ("exclusive_copy", "xdp.frags"),
            ("tap_ingress", "classifier"),
            ("tap_egress", "classifier"),
            ("tap_xdp", "xdp.frags"),
        ],
        maps: &[
            "SWITCH",
            "TABLES",
            "SPORTS",
            "DPORTS",
            "COUNTERS",
            "SOCKETS",
            "RINGS",
            "POSITIONS",
            "BELLS",
        ],
    },
    Required {
        name: "generator",
        programs: &[
            ("generate", "xdp"),
            ("pass", "xdp.frags"),
            ("drop", "xdp.frags"),
            ("receive", "xdp.frags"),
            ("look_on", "classifier"),
            ("again", "xdp.frags"),
        ],
        maps: &["CONFIG", "SENT", "SOCKETS", "MEASURED"],
    },
];

/// Sections that every object needs: types for the kernel, line numbers for the verifier's log, and
/// a license that opens the GPL-only helpers.
const SECTIONS: &[&str] = &[".BTF", ".BTF.ext", "license"];

impl Required {
    /// Everything that is not as it must be, one sentence each; an object that cannot be read is an
    /// error.
    pub(crate) fn faults(&self, bytes: &[u8]) -> Result<Vec<String>> {
        let file = object::File::parse(bytes).context("not an ELF object")?;
        let mut faults = Vec::new();
        for name in SECTIONS {
            match file.section_by_name(name) {
                None => faults.push(format!("section {name} is missing")),
                Some(section) if section.size() == 0 => {
                    faults.push(format!("section {name} is empty"));
                }
                Some(_) => {}
            }
        }
        if let Some(license) = file.section_by_name("license")
            && !license.data()?.windows(3).any(|word| word == b"GPL")
        {
            faults.push("the license in section license is none that the kernel takes".into());
        }
        let symbols: BTreeMap<_, _> = file
            .symbols()
            .filter_map(|symbol| {
                let section = file.section_by_index(symbol.section_index()?).ok()?;
                let size = symbol.size();
                Some((symbol.name().ok()?, (symbol.kind(), section.name().ok()?, size)))
            })
            .collect();
        let mut check =
            |what: &str, name: &str, kind: SymbolKind, at: &[&str]| match symbols.get(name) {
                None => faults.push(format!("{what} {name} is missing")),
                Some((_, section, _)) if !at.contains(section) => {
                    faults.push(format!("{what} {name} is in section {section}, not {}", at[0]));
                }
                Some((found, _, size)) if *found != kind || *size == 0 => {
                    faults.push(format!("{name} is no {what}"));
                }
                Some(_) => {}
            };
        for (program, section) in self.programs {
            check("program", program, SymbolKind::Text, &[section]);
        }
        for map in self.maps {
            check("map", map, SymbolKind::Data, &["maps", ".maps"]);
        }
        Ok(faults)
    }
}

/// The object without what neither the kernel nor the loader reads, four fifths of the file: DWARF,
/// from which BTF has been made, and relocations of BTF, which the loader does by symbols' names.
pub(crate) fn slimmed(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut file = Builder::read(bytes)?;
    for section in &mut file.sections {
        let name = section.name.as_slice();
        section.delete = [&b".debug_"[..], b".rel.debug_", b".rel.BTF"]
            .iter()
            .any(|prefix| name.starts_with(prefix));
    }
    // LLVM keeps the sections' names in the symbols' string table; this writer wants two.
    if !file.sections.iter().any(|section| matches!(section.data, SectionData::SectionString)) {
        let names = file.sections.add();
        names.name = ".shstrtab".into();
        names.sh_type = object::elf::SHT_STRTAB;
        names.sh_addralign = 1;
        names.data = SectionData::SectionString;
    }
    file.set_section_sizes();
    let mut stripped = Vec::new();
    file.write(&mut stripped)?;
    Ok(stripped)
}

/// How two objects differ, for a person: sizes of sections, then the first lines of the difference
/// between their disassemblies.
pub(crate) fn difference(committed: &Path, built: &Path) -> Result<String> {
    let read =
        |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let (old_bytes, new_bytes) = (read(committed)?, read(built)?);
    let (old, new) = (sections(&old_bytes)?, sections(&new_bytes)?);
    let mut text = format!("{:<28}{:>12}{:>12}\n", "section", "committed", "built");
    for name in old.keys().chain(new.keys()).collect::<BTreeSet<_>>() {
        let (a, b) = (old.get(name), new.get(name));
        let size = |data: Option<&Vec<u8>>| data.map_or("-".into(), |data| data.len().to_string());
        let mark = if a == b { "" } else { "  differs" };
        writeln!(text, "{name:<28}{:>12}{:>12}{mark}", size(a), size(b))?;
    }
    text.push_str(&disassembly_difference(committed, built)?);
    Ok(text)
}

fn sections(bytes: &[u8]) -> Result<BTreeMap<String, Vec<u8>>> {
    let file = object::File::parse(bytes).map_err(|error| anyhow!("not an ELF object: {error}"))?;
    let mut sections = BTreeMap::new();
    for section in file.sections() {
        sections.insert(section.name()?.to_owned(), section.data()?.to_vec());
    }
    Ok(sections)
}

/// Longest difference worth printing, lines: more is a rewrite, not a review.
const SHOWN_LINES: usize = 200;

fn disassembly_difference(committed: &Path, built: &Path) -> Result<String> {
    // Debian has LLVM's tools with and without a version in their names.
    let versioned = (14..=30).rev().map(|version| format!("llvm-objdump-{version}"));
    let Some(objdump) =
        ["llvm-objdump".to_owned()].into_iter().chain(versioned).find(|name| which(name).is_some())
    else {
        return Ok("(llvm-objdump, in apt's llvm, would show which instructions differ)\n".into());
    };
    let listing = |object: &Path, name: &str| -> Result<PathBuf> {
        let mut dump = command(&objdump);
        dump.args(["--disassemble", "--reloc", "--no-show-raw-insn", "--no-leading-addr"]);
        let text = output(dump.arg(object))?;
        // The first lines name the file.
        let text = text.find("Disassembly").map_or("", |start| &text[start..]);
        let file = built.with_file_name(name);
        fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        Ok(file)
    };
    let (old, new) = (listing(committed, "committed.s")?, listing(built, "built.s")?);
    let diff = command("diff")
        .args(["--unified", "--label", "committed", "--label", "built"])
        .args([&old, &new])
        .output()
        .context("cannot run diff")?;
    let diff = String::from_utf8_lossy(&diff.stdout);
    if diff.is_empty() {
        return Ok("The instructions are the same.\n".into());
    }
    let mut text = String::new();
    for line in diff.lines().take(SHOWN_LINES) {
        writeln!(text, "{line}")?;
    }
    let left_out = diff.lines().count().saturating_sub(SHOWN_LINES);
    if left_out > 0 {
        writeln!(
            text,
            "... and {left_out} more lines: diff -u {} {}",
            old.display(),
            new.display()
        )?;
    }
    Ok(text)
}
