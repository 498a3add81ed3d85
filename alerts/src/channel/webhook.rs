//! A webhook: the event as it is, by POST.

use catalog::alert::channel::Channel;
use serde_json::Value;

use super::{Error, http, required};

pub(super) async fn send(channel: &Channel, event: &Value) -> Result<(), Error> {
    let url = required(channel, "url")?;
    let authorization = channel.secret("authorization").map_err(Error::Options)?;
    http::post(channel, &url, authorization, event.to_string()).await
}
