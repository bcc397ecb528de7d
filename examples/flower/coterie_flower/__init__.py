"""A federation of coterie, started by Flower: `server_app` asks the sites, `client_app` starts a site's member."""
