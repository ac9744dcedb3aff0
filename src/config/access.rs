//! Who may do what over the control socket.

use super::document::Section;

const NAME_CHARACTERS_MAX: usize = 64;

/// Users and groups by what they may do; whoever is named for more may do the less, too.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Access {
    pub viewer: Vec<Principal>,
    pub operator: Vec<Principal>,
    pub admin: Vec<Principal>,
}

/// A user or a group of this host, by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Principal {
    User(String),
    Group(String),
}

impl Access {
    pub(super) fn read(section: Section<'_>) -> Access {
        let access = Access {
            viewer: read_principals(&section, "viewer"),
            operator: read_principals(&section, "operator"),
            admin: read_principals(&section, "admin"),
        };
        section.finish();
        access
    }

    pub fn is_empty(&self) -> bool {
        self.viewer.is_empty() && self.operator.is_empty() && self.admin.is_empty()
    }
}

fn read_principals(section: &Section<'_>, key: &'static str) -> Vec<Principal> {
    let written = section.text_list(key).unwrap_or_default();
    let parsed = written.iter().filter_map(|text| match text.value.parse() {
        Ok(principal) => Some(principal),
        Err(message) => {
            section.report_at(text, message);
            None
        }
    });
    parsed.collect()
}

impl std::str::FromStr for Principal {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let plain = |name: &&str| {
            let sound = |c: char| !c.is_control() && !c.is_whitespace() && !matches!(c, ':' | ',' | '/');
            (1..=NAME_CHARACTERS_MAX).contains(&name.len()) && name.chars().all(sound)
        };
        match text.split_once(':').map(|(kind, name)| (kind, Some(name).filter(plain))) {
            Some(("user", Some(name))) => Ok(Principal::User(name.to_owned())),
            Some(("group", Some(name))) => Ok(Principal::Group(name.to_owned())),
            _ => Err(format!("{text:?} is neither \"user:NAME\" nor \"group:NAME\"")),
        }
    }
}
