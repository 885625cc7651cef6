"""The word pools that the task families combine. Pools are wide so that combinations, not words, are what is held out."""

EN_WORDS = """apple river stone cloud green happy quick table window garden music paper light water bread silver
winter summer forest ocean mountain bridge candle dragon eagle flower guitar hammer island jacket kitchen ladder
market needle orange pencil queen rabbit school tiger umbrella valley wolf yellow zebra book chair door engine
friend glass horse iron jungle king lemon moon night pearl road sun tree uncle village wind year blue cold dark
early fresh gold high kind long new old pink red small tall warm young bird cat dog fish milk rain snow star time
city house train plane ship""".split()

KO_WORDS = """사과 강물 바위 구름 초록 행복 시간 책상 창문 정원 음악 종이 햇빛 바다 식빵 은빛 겨울 여름 가을 봄날 숲속 산길
다리 촛불 하늘 독수리 꽃잎 기타 망치 섬마을 외투 부엌 사다리 시장 바늘 오렌지 연필 여왕 토끼 학교 호랑이 우산 골짜기 늑대
노랑 얼룩말 공책 의자 대문 엔진 친구 유리 망아지 철길 밀림 임금 레몬 달빛 저녁 진주 도로 태양 나무 삼촌 동네 바람 파랑 추위
어둠 아침 우유 금빛 키다리 분홍 빨강 고양이 강아지 물고기 빗물 눈꽃 별빛 도시 주택 기차 비행기 여객선 참새 수박 포도 김치
두부 국수 만두 가방""".split()

EN_NAMES = """Mina Tom Anna Peter Julia Oscar Nora Liam Emma Noah Olivia Lucas Mia Ethan Ava Henry Sofia Jack Grace Leo
Clara Daniel Ella Felix Hana Ivan Jane Kevin Laura Marco Nina Owen Paula Quinn Rosa Simon Tina Victor Wendy Yuna Alice
Brian Chloe David Elena Frank Gina Harry Irene Jason""".split()

EN_CITIES = """Seoul Busan London Paris Berlin Tokyo Madrid Rome Vienna Oslo Dublin Lisbon Prague Toronto Boston Chicago
Denver Seattle Austin Sydney Cairo Delhi Lima Athens Helsinki Warsaw Zurich Geneva Milan Kyoto Osaka Incheon Daegu Jeju
Hanoi Bangkok Dubai Nairobi Montreal Houston""".split()

KO_FAMILY_NAMES = "김 이 박 최 정 강 조 윤 장 임 한 오 서 신 권 황".split()

KO_GIVEN_NAMES = """민수 지은 서준 하은 도윤 서연 지호 수아 예준 지우 민재 유진 현우 은지 성민 미나 동현 소영 재호 혜진
준영 다은 태현 보라 상우 가영 시우 채원 건우 나연 영희 철수 정호 수빈 진우 아름""".split()

KO_CITIES = """서울 부산 대구 인천 광주 대전 울산 수원 춘천 강릉 전주 제주 창원 포항 여수 목포 청주 천안 안양 성남 고양
용인 경주 김해 진주 군산 속초 원주 세종 평택 런던 파리 도쿄 뉴욕 베를린 로마""".split()

EN_JOBS = "a teacher, a nurse, a baker, a student, a painter, an engineer, a driver, a farmer".split(", ")
KO_JOBS = "선생님 간호사 제빵사 학생 화가 개발자 기사 농부".split()

EN_SUBJECTS = """movie food service book hotel game phone coffee concert song room staff app pizza show trip museum
course story camera""".split()

KO_SUBJECTS = """영화 음식 서비스 책 호텔 게임 전화기 커피 공연 노래 방 직원 앱 피자 드라마 여행 박물관 강의 이야기
카메라""".split()

# label -> predicates that follow "The <subject> was" and, for Korean, "이 <subject>".
EN_PREDICATES = {
    "positive": """great wonderful amazing excellent fantastic lovely perfect brilliant delightful superb impressive
outstanding""".split(),
    "negative": """terrible awful boring horrible disappointing bad dreadful poor annoying unpleasant useless
disgusting""".split(),
    "neutral": "okay, average, ordinary, so-so, nothing special, just normal".split(", "),
}

KO_PREDICATES = {
    "긍정": """재미있어요 좋아요 훌륭해요 최고예요 멋져요 즐거워요 만족스러워요 완벽해요 감동적이에요 대단해요
추천해요 사랑스러워요""".split(),
    "부정": """지루해요 별로예요 최악이에요 실망스러워요 끔찍해요 싫어요 형편없어요 불만이에요 답답해요 짜증나요
후회돼요 엉망이에요""".split(),
    "중립": "그저 그래요, 보통이에요, 평범해요, 무난해요, 그냥 그래요, 나쁘지도 좋지도 않아요".split(", "),
}

EN_ADVERBS = ["", "really ", "so ", "absolutely ", "truly ", "quite "]
KO_ADVERBS = ["", "정말 ", "너무 ", "진짜 ", "아주 ", "참 "]
EN_MILD_ADVERBS = ["", "honestly ", "just about ", "overall "]
KO_MILD_ADVERBS = ["", "솔직히 ", "전체적으로 ", "대체로 "]
EN_TAILS = ["", " I went with a friend.", " That is what I think.", " My sister said the same."]
KO_TAILS = ["", " 친구와 같이 봤어요.", " 제 생각은 그래요.", " 동생도 그렇게 말했어요."]
