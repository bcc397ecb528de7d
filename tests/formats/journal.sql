BEGIN TRANSACTION;
CREATE TABLE attempts (round INTEGER PRIMARY KEY, highest INTEGER NOT NULL);
INSERT INTO "attempts" VALUES(1,1);
CREATE TABLE changes (seq INTEGER PRIMARY KEY, at REAL, phase TEXT, round INTEGER, attempt INTEGER,
    note TEXT NOT NULL);
INSERT INTO "changes" VALUES(1,1.79588910800495696069e+09,'compute',1,1,'');
INSERT INTO "changes" VALUES(2,1.79588910800776886938e+09,'step',1,1,'');
INSERT INTO "changes" VALUES(3,1.79588910801284813885e+09,'checkpoint',1,1,'');
CREATE TABLE commits (
    round INTEGER, attempt INTEGER, seq INTEGER, at REAL, undone INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (round, attempt)
);
INSERT INTO "commits" VALUES(1,1,2,1.79588910800776886938e+09,0);
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO "meta" VALUES('format','1');
INSERT INTO "meta" VALUES('federation','grove');
INSERT INTO "meta" VALUES('agreement','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa');
INSERT INTO "meta" VALUES('run','7036934897b2b17f');
CREATE TABLE records (round INTEGER PRIMARY KEY, record TEXT NOT NULL, at REAL);
INSERT INTO "records" VALUES(1,'{"round":1,"files":{"alder":{"round":1,"digest":"bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"},"birch":{"round":1,"digest":"cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"}}}',1.79588910801284813885e+09);
CREATE TABLE state (id INTEGER PRIMARY KEY CHECK (id = 1), state TEXT NOT NULL);
INSERT INTO "state" VALUES(1,'{"seq":3,"phase":"checkpoint","round":1,"attempt":1,"committed":1,"committed_attempt":1,"epoch":0,"furthest":[0,0],"failures":0,"interruptions":0,"begun":false,"evaluated":0,"absent":[],"rejoining":[],"sources":{},"ending":"","code":"","note":""}');
COMMIT;
