//! `pgrecall reload`: the running daemon applies its configuration as it is now.

use hyper::Method;

use super::{Context, remote};
use crate::control::client::Client;
use crate::error::Failure;

pub async fn run(context: &Context) -> Result<(), Failure> {
    let client = Client::new(&context.socket());
    remote::show(context, &client, Method::POST, "/v1/reload", None).await
}
