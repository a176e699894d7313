"""A server that speaks OpenAI's protocol. `app` puts it together, `service` is what routes use."""
